"""Server settings from a plan's fit, and the arguments of each llama-server."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.llama_cpp.embedded_server import parameters
from mode_gguf.llama_cpp.llama_server import ServerSettings, running_server, server_settings
from mode_gguf.options import ServingOptions
from tests.validation.conftest import Files

FIT = FitSettings(context=3000, parallel=2, kv_type="q8_0", image_tokens=500)


def test_defaults(full: Files) -> None:
    serving = server_settings(full.text, None, None, ServingOptions(host="::1", port=7))
    assert serving.url == "http://[::1]:7"
    assert serving.options == [*("--host", "::1", "--port", "7", "--jinja", "--ctx-size", "4096", "--parallel", "1")], (
        "pico was trained for 4096 tokens"
    )
    assert server_settings(full.text, None, None, ServingOptions(host="0.0.0.0", port=7)).url == "http://127.0.0.1:7"


def test_as_planned(full: Files) -> None:
    serving = server_settings(full.text, None, FIT, ServingOptions(host="127.0.0.1", port=0))
    assert serving.port > 0
    options = " ".join(serving.options)
    assert "--ctx-size 3000 --parallel 2 --cache-type-k q8_0 --cache-type-v q8_0 --flash-attn on" in options
    assert "--gpu-layers all --fit off --image-max-tokens 500" in options


def test_more_context_than_planned_may_not_fit(full: Files) -> None:
    serving = server_settings(full.text, None, FIT, ServingOptions(host="127.0.0.1", port=1, context=4000))
    assert (serving.context, serving.planned) == (4000, False)
    assert "--fit off" not in " ".join(serving.options)


@pytest.mark.parametrize("extra", [("--port", "9"), ("--port=9",), ("--port", "8", "--port", "9")], ids=str)
def test_a_port_given_to_llama_server_counts(full: Files, extra: tuple[str, ...]) -> None:
    assert (
        server_settings(full.text, None, None, ServingOptions(host="127.0.0.1", port=1), extra).url
        == "http://127.0.0.1:9"
    )


def test_parameters_of_the_embedded_server() -> None:
    serving = ServerSettings(Path("m"), Path("p"), "127.0.0.1", 5, 3000, 2, "q8_0", planned=True, image_tokens=500)
    params = parameters(json.loads(json.dumps(asdict(serving), default=str)))
    assert (params.model.path, params.mmproj.path, params.port, params.hostnames) == ("m", "p", 5, ["127.0.0.1"])
    assert (params.n_ctx, params.n_parallel, params.fit_params) == (3000, 2, False)
    assert params.cache_type_k.name == params.cache_type_v.name == "GGML_TYPE_Q8_0"
    assert params.flash_attn_type.name == "LLAMA_FLASH_ATTN_TYPE_ENABLED"
    assert (params.image_max_tokens, params.use_jinja) == (500, True)


def test_a_server_that_does_not_want_to_end_is_made_to(
    full: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mode_gguf.llama_cpp.llama_server._STOP_SECONDS", 0.3)
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(
        "#!/usr/bin/env python3\n"
        "import http.server, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "class Ok(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Ok).serve_forever()\n"
    )
    stubborn.chmod(0o755)
    serving = server_settings(full.text, None, None, ServingOptions(host="127.0.0.1", port=0))
    lines: list[str] = []
    with running_server([str(stubborn), str(serving.port)], serving, lines.append) as server:
        assert server.process.poll() is None
    assert server.process.returncode == -9
    assert any("/health" in line for line in lines)
