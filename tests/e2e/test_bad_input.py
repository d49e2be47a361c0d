"""Bad input: one clear line, the right exit code, nothing under a final name, the input untouched."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import Run, settings


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(pico, tmp_path / "pico"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def dense(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text = {key: value for key, value in text.items() if "expert" not in key}
    edit_config(folder, architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl", text_config=text)


def unknown(folder: Path) -> None:
    edit_config(folder, architectures=["SomethingElseForConditionalGeneration"], model_type="something")


def missing_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def truncated_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def outside_shard(folder: Path) -> None:
    shutil.copy(sorted(folder.glob("model-*.safetensors"))[-1], folder.parent / "outside.safetensors")

    def change(weight_map: dict[str, str]) -> None:
        weight_map[next(iter(weight_map))] = "../outside.safetensors"

    edit_index(folder, change)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (dense, "Mixture-of-Experts"),
        (unknown, "SomethingElseForConditionalGeneration"),
        (missing_shard, "safetensors"),
        (truncated_shard, "truncated|incomplete|bytes"),
        (outside_shard, "outside"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unusable_checkpoints(
    copy: Path,
    tmp_path: Path,
    run: Run,
    damage: Callable[[Path], None],
    says: str,
) -> None:
    damage(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = run("convert", copy, "--bpw", "4.0", "--out", tmp_path / "out", code=4)
    assert any(word in line for word in says.split("|")), line
    assert not (tmp_path / "out").exists()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_nan_weights_stop_the_export_and_are_named(copy: Path, tmp_path: Path, run: Run) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    name = "model.language_model.layers.0.mlp.experts.down_proj"
    shard = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(shard, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name][1, 2, 3] = float("nan")
    save_file(tensors, shard, {"format": "pt"})

    out = tmp_path / "out"
    run("plan", copy, "--uniform", "Q2_K", "--out", out)
    line = run("export", copy, "--out", out, code=4)
    assert f"tensor {name} is NaN at expert 1, row 2, column 3" in line
    assert list(out.glob("*.gguf")) == []
    assert list(out.glob("*.part")) == []


def test_gguf_given_as_model(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert "GGUF" in run("convert", file, "--bpw", "3.0", code=4)


def test_impossible_budget(pico: Path, tmp_path: Path, run: Run) -> None:
    line = run("convert", pico, "--bpw", "1.5", "--out", tmp_path / "out", code=3)
    assert "--bpw 1.5" in line
    assert "bits per weight" in line
    assert not (tmp_path / "out").exists()


def test_no_disk_space(pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run("plan", pico, "--uniform", "Q4_K", "--out", out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = run("export", pico, "--out", out, code=4)
    assert "disk" in line or "free" in line
    assert list(out.glob("*.gguf")) == []


def test_broken_image_in_the_calibration_set(pico: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:40])
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Black."}]
    rows = [{"image": name, "conversations": turns} for name in ("good.png", "bad.png")]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    line = run("convert", pico, "--bpw", "4", "--calibration", folder, "--out", out, code=4)
    assert "bad.png" in line
    assert not out.exists()


def test_unknown_type_is_a_usage_error(pico: Path, run: Run) -> None:
    assert "Q9_K" in run("convert", pico, *settings("sensitivity.types=Q9_K"), code=2)


def test_ctrl_c_leaves_no_final_file(pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mode_gguf_cli", "convert", str(pico), "--bpw", "4.0", "--out", str(out)]
    # Jobs in the background are started with SIGINT ignored, and so would be their children.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as process:
        watchdog = Timer(120, process.kill)
        watchdog.start()
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("calibrating"):  # work has begun
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        watchdog.cancel()
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(out.rglob("*.part")) == []
    assert list(out.glob("*.gguf")) == []
