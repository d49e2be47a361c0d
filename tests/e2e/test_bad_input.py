"""Bad input: one clear line, the right exit code, nothing under a final name, the input untouched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode_gguf_cli.main import main

FINAL_SUFFIXES = {".gguf", ".json", ".txt", ".safetensors"}


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(pico, tmp_path / "pico"))


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path
) -> str:
    """Run a command that must end with `code` and one line on stderr; returns that line."""
    monkeypatch.setattr(sys, "argv", ["mode-gguf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    return errors[0]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def dense(folder: Path) -> None:
    edit_config(folder, architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl")


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
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    says: str,
) -> None:
    damage(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = refused(monkeypatch, capsys, 4, "convert", copy, "--bpw", "4.0", "--out", tmp_path / "out")
    assert any(word in line for word in says.split("|")), line
    assert not (tmp_path / "out").exists()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_nan_weights_stop_the_export_and_are_named(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    name = "model.language_model.layers.0.mlp.experts.down_proj"
    shard = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(shard, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name][1, 2, 3] = float("nan")
    save_file(tensors, shard, {"format": "pt"})

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["mode-gguf", "plan", str(copy), "--uniform", "Q2_K", "--out", str(out), "--json"])
    main()
    capsys.readouterr()
    line = refused(monkeypatch, capsys, 4, "export", copy, "--out", out)
    assert "blk.0.ffn_down_exps.weight" in line
    assert "expert 1" in line
    assert list(out.glob("*.gguf")) == []
    assert list(out.glob("*.part")) == []


def test_gguf_given_as_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert "GGUF" in refused(monkeypatch, capsys, 4, "convert", file, "--bpw", "3.0")


def test_impossible_budget(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(monkeypatch, capsys, 3, "convert", pico, "--bpw", "1.5", "--out", tmp_path / "out")
    assert "--bpw 1.5" in line
    assert "bits per weight" in line
    assert not (tmp_path / "out").exists()


def test_no_disk_space(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["mode-gguf", "plan", str(pico), "--uniform", "Q4_K", "--out", str(out), "--json"])
    main()
    capsys.readouterr()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = refused(monkeypatch, capsys, 4, "export", pico, "--out", out)
    assert "disk" in line or "free" in line
    assert list(out.glob("*.gguf")) == []


def test_broken_image_in_the_calibration_set(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:40])
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Black."}]
    rows = [{"image": name, "conversations": turns} for name in ("good.png", "bad.png")]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    line = refused(monkeypatch, capsys, 4, "convert", pico, "--bpw", "4", "--calibration", folder, "--out", out)
    assert "bad.png" in line
    assert not out.exists()


def test_unknown_type_is_a_usage_error(
    pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Q9_K" in refused(monkeypatch, capsys, 2, "convert", pico, "--types", "Q9_K")


def test_ctrl_c_leaves_no_final_file(pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mode_gguf_cli", "convert", str(pico), "--bpw", "4.0", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        for line in process.stderr:  # the first line of progress shows that work has begun
            if "done" in line or " of " in line:
                break
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        rest = process.stderr.read()
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        process.kill()
    assert code == 130, rest
    assert "Traceback" not in rest
    assert list(out.glob("*.part")) == []
    assert not list(out.glob("*bpw*.gguf"))
