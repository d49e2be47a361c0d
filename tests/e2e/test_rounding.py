"""Rounding with error feedback, from the command line to a file that llama.cpp runs."""

import json
import shutil
from pathlib import Path

from gguf import GGUFReader

from mode_gguf.workfolder import WorkFolder
from tests.e2e.conftest import SMALL, Run, samples


def tensors_of(path: str) -> dict[str, tuple[int, bytes]]:
    return {tensor.name: (int(tensor.tensor_type), tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


def test_stages_alone_give_the_same_file(pico: Path, out: Path, run: Run) -> None:
    whole = json.loads(
        run("convert", pico, "--bpw", "3.5", "--out", out, "--rounding", "feedback", "--no-validate", "--json", *SMALL)
    )
    rounding = json.loads((out / "rounding.json").read_text())
    assert sum(rounding["matrices"].values()) > 0
    assert not WorkFolder(out, pico.name).rounded.exists(), "packed layers are in the file, and not needed again"
    with_feedback = tensors_of(whole["model"])
    nearest = json.loads(run("export", pico, "--out", out, "--rounding", "nearest", "--json"))
    rounded_to_nearest = tensors_of(nearest["model"])
    assert {name: kind for name, (kind, _) in with_feedback.items()} == {
        name: kind for name, (kind, _) in rounded_to_nearest.items()
    }
    different = {name for name, tensor in with_feedback.items() if tensor != rounded_to_nearest[name]}
    assert {name for name in different if "exps" in name}
    assert "token_embd.weight" not in different

    run("export", pico, "--out", out)
    assert tensors_of(nearest["model"]) == with_feedback
    assert not (out / "rounded").exists()


def test_other_samples_are_refused(pico: Path, out: Path, tmp_path: Path, run: Run) -> None:
    """A calibration that was repeated with other samples after `sensitivity`."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    run("calibrate", pico, "--out", copy, *samples(2, 4))
    run("plan", pico, "--bpw", "4.0", "--out", copy, "--rounding", "feedback")
    message = run("export", pico, "--out", copy, code=4)
    assert "token-weights.safetensors: made from other samples than these" in message
