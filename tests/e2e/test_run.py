"""A finished pair is served and answers about a picture; what can go wrong is one sentence."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.quantization.types import QUANT_TYPES
from tests.e2e.conftest import Run
from tests.llama_cpp.stand_ins import write_program


@pytest.fixture(autouse=True)
def _only_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama-server is found here, whatever this machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.delenv("MODE_GGUF_LLAMA_CPP", raising=False)


@pytest.fixture(scope="module")
def pair(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text model, its projector, an importance matrix, and nothing else."""
    folder, checkpoint = tmp_path_factory.mktemp("pair"), Checkpoint.open(pico)
    types = {t.name: QUANT_TYPES["F32" if t.role is Role.KEEP else "Q8_0"] for t in text_tensors(checkpoint)}
    write_text_model(folder / "pico-Q8_0.gguf", checkpoint, TensorPacking(types))
    write_projector(folder / "mmproj-pico-F16.gguf", checkpoint)
    (folder / "imatrix-pico.gguf").write_bytes(b"GGUF")
    return folder


@contextmanager
def started(arguments: Sequence[str | Path]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "mode_gguf_cli", "run", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(process: "subprocess.Popen[str]") -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not listed.exists():
        pytest.skip("needs Linux's /proc")
    return list(map(int, listed.read_text().split()))


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_a_picture_is_answered(pair: Path, tmp_path: Path, ended_by: signal.Signals) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (96, 64), "red").save(picture)
    with started([pair, "--port", "0"]) as process:
        assert process.stdout is not None
        line, example = process.stdout.readline(), process.stdout.readline()
        url = line.split()[0]
        assert line.startswith("http://127.0.0.1:"), line
        assert "pico-Q8_0.gguf, pictures through mmproj-pico-F16.gguf, 4096 tokens of context" in line
        (server,) = children(process)

        question = {"type": "text", "text": "What is in this picture?"}
        data = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, question]
        body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4}).encode()
        request = Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(urlopen(request, timeout=60).read())
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] > 0
        assert answer["usage"]["prompt_tokens"] > 6, "the picture takes tokens, too"

        shell = example.partition("ask it")[2].strip()
        done = subprocess.run(["sh", "-n", "-c", shell], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert url in shell

        process.send_signal(ended_by)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert said.strip().endswith("stopped")
    assert "embedded llama.cpp" in said
    assert not Path(f"/proc/{server}").exists()


def test_the_server_ends_with_the_command(pair: Path) -> None:
    with started([pair, "--port", "0"]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (server,) = children(process)
        process.kill()
        process.wait()
        for _ in range(100):
            if not Path(f"/proc/{server}").exists():
                return
            time.sleep(0.1)
    pytest.fail("it is still there")


def test_a_port_that_is_taken(pair: Path, run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 cannot be used" in run("run", pair, "--port", str(port), code=4)


def test_a_server_that_dies_says_why(pair: Path, tmp_path: Path, run: Run) -> None:
    tools = tmp_path / "tools"
    write_program(tools / "llama-server", "echo 'loading the model'\necho 'error: no more luck' >&2\nexit 3")
    error = run("run", pair, "--port", "0", "--llama-cpp", tools, code=4)
    assert "pico-Q8_0.gguf: its server ended with code 3: error: no more luck" in error


def test_arguments_of_llama_server(pair: Path, tmp_path: Path, run: Run) -> None:
    tools = tmp_path / "tools"
    write_program(tools / "llama-server", 'echo "error: $*"\nexit 1')
    told = run("run", pair, "--llama-cpp", tools, "--", "--port", "0", "--threads", "2", code=4)
    assert f"-m {pair / 'pico-Q8_0.gguf'} --mmproj {pair / 'mmproj-pico-F16.gguf'} --host 127.0.0.1 --port" in told
    assert "--jinja --ctx-size 4096 --parallel 1 --port 0 --threads 2" in told


def test_what_cannot_be_run(pair: Path, tmp_path: Path, run: Run) -> None:
    assert "holds no GGUF model" in run("run", tmp_path, code=4)
    assert "goes to llama-server, and none was found" in run("run", pair, "--port", "0", "--", "--threads", "2", code=2)
    assert "--port eighty is not a port" in run("run", pair, "--", "--port", "eighty", code=2)
