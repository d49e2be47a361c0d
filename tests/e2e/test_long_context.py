"""Variants for a longer context: what the file says of their positions, and scalings that are refused at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.gguf.header import read_header
from tests.e2e.conftest import QUICK, Run, samples
from tests.families.changed import changed

SECTIONS = {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024, **SECTIONS}


@pytest.fixture
def yarn(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint with the older name of the kind."""
    return changed(pico, tmp_path / "yarn", "text_config", rope_scaling={"type": "yarn", **YARN}).path


def scaling(model: str | Path) -> dict[str, Any]:
    keys = read_header(Path(model)).metadata
    begin = "qwen3vlmoe.rope.scaling."
    return {key.removeprefix(begin): value for key, value in keys.items() if key.startswith(begin)}


def test_yarn_is_in_the_file(yarn: Path, tmp_path: Path, run: Run) -> None:
    """With statistics of our own, and with others', for which transformers' model is not run."""
    before, out = (yarn / "config.json").read_bytes(), tmp_path / "own"
    own = json.loads(run("convert", yarn, "--bpw", "3.5", "--out", out, "--no-validate", *QUICK, "--json"))
    (imatrix,) = (path for path in out.glob("imatrix-*.gguf") if "fisher" not in path.name)
    arguments = ("--bpw", "3.5", "--out", tmp_path / "other", "--no-validate", "--calibration-from", imatrix)
    other = json.loads(run("convert", yarn, *arguments, "--json"))
    expected = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 1024,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }
    assert scaling(own["model"]) == scaling(other["model"]) == expected
    assert (yarn / "config.json").read_bytes() == before


@pytest.mark.parametrize("rehearsal", [("--dry-run",), ()], ids=["dry run", "convert"])
def test_another_scaling_is_refused_before_anything_is_measured(
    pico: Path, tmp_path: Path, run: Run, rehearsal: tuple[str, ...]
) -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, **YARN}
    other = changed(pico, tmp_path / "longrope", "text_config", rope_scaling=rope).path
    out = tmp_path / "work"
    line = run("convert", other, "--bpw", "3.5", "--out", out, *samples(1, 1), *rehearsal, code=4)
    assert "config.json: rope_type is 'longrope', expected 'default' or 'dynamic' or 'linear' or 'yarn'" in line
    assert "llama.cpp's qwen3vlmoe runs no other scaling" in line
    assert not list(out.glob("*"))
