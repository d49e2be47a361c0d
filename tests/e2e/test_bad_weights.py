"""Weights that no file can hold: NaN, infinity and what overflows stop at the first stage that reads them, by name."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mode_gguf.architectures.base_gguf import open_base
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.gguf.header import read_header
from tests.base_gguf import write_family_base
from tests.checkpoint.fp8_copies import write_fp8
from tests.checkpoint.weights import save_alone, weights_of
from tests.e2e.conftest import QUICK, Run, samples
from tests.families.pico.kimi import write_pico_kimi

LAYER = "model.language_model.layers.1"
NAN, INF = float("nan"), float("inf")

Place = tuple[int, ...]


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(pico, tmp_path / "pico"))


def damage(folder: Path, name: str, place: Place, value: float) -> None:
    weights = weights_of(folder)
    weights[name][place] = value
    save_alone(folder, weights)


def stopped(run: Run, folder: Path, out: Path, *more: str | Path) -> str:
    """The line that a conversion ends with; nothing of it is left under a final name."""
    line = run("convert", folder, "--bpw", "4.0", "--out", out, "--no-validate", *more, code=4)
    assert not list(out.glob("*.part"))
    assert not list(out.glob("*MODE*.gguf"))
    return line


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        (f"{LAYER}.mlp.experts.down_proj", (3, 5, 7), NAN, "is NaN at expert 3, row 5, column 7"),
        (f"{LAYER}.mlp.experts.gate_up_proj", (2, 0, 600), -INF, "is -infinite at expert 2, row 0, column 600"),
        (f"{LAYER}.self_attn.k_proj.weight", (5, 7), INF, "is infinite at row 5, column 7"),
        (f"{LAYER}.mlp.gate.weight", (1, 2), NAN, "is NaN at row 1, column 2"),
        (f"{LAYER}.input_layernorm.weight", (9,), INF, "is infinite at [9]"),
        ("model.language_model.embed_tokens.weight", (300, 2), NAN, "is NaN at row 300, column 2"),
        ("lm_head.weight", (511, 255), NAN, "is NaN at row 511, column 255"),
        ("model.visual.blocks.0.attn.qkv.weight", (4, 4), NAN, "is NaN at row 4, column 4"),
        ("model.visual.patch_embed.proj.weight", (1, 2, 0, 3, 3), INF, "is infinite at [1, 2, 0, 3, 3]"),
        ("model.visual.merger.linear_fc2.bias", (0,), NAN, "is NaN at [0]"),
    ],
)
def test_before_or_while_the_model_first_runs(
    copy: Path, tmp_path: Path, run: Run, name: str, place: Place, value: float, says: str
) -> None:
    damage(copy, name, place, value)
    out = tmp_path / "out"
    line = stopped(run, copy, out, *QUICK)
    assert f"tensor {name} {says}; weights must be finite" in line
    assert not (out / "calibration.safetensors").exists()


@pytest.mark.parametrize(("name", "says"), [("_scale", "row 3, column 0"), ("", "NaN at row 3, column 5")])
def test_in_fp8(pico: Path, tmp_path: Path, run: Run, name: str, says: str) -> None:
    small, _ = write_fp8(pico, tmp_path)
    weights = weights_of(small)
    stored = weights[f"{LAYER}.self_attn.q_proj.weight{name}"]
    if name:
        stored[3] = NAN
    else:
        stored.view(torch.uint8)[3, 5] = 0x7F
    save_alone(small, weights)
    assert f"q_proj.weight{name} is " in (line := stopped(run, small, tmp_path / "out", *QUICK))
    assert says in line


def test_in_packed_scales(tmp_path: Path, run: Run) -> None:
    folder = write_pico_kimi(tmp_path / "kimi", "kimi_k25_packed")
    name = "language_model.model.layers.1.mlp.experts.2.down_proj.weight_scale"
    damage(folder, name, (4, 1), INF)
    assert f"tensor {name} is infinite at expert 2, row 4, column 1" in stopped(run, folder, tmp_path / "out", *QUICK)


@pytest.fixture
def imatrix(pico: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base GGUF of the pico checkpoint, and an importance matrix for both."""
    text, _ = write_family_base(Checkpoint.open(pico), tmp_path)
    entries = {
        tensor.name: (np.ones((tensor.n_experts, tensor.row_width)), np.ones(tensor.n_experts))
        for tensor in open_base(text).tensors
        if tensor.activation is not None
    }
    write_imatrix(tmp_path / "imatrix.gguf", entries, ("d",), 1, 10)
    return text, tmp_path / "imatrix.gguf"


@pytest.mark.parametrize(
    ("name", "place", "early"),
    [
        (f"{LAYER}.mlp.experts.down_proj", (3, 5, 7), False),
        ("lm_head.weight", (511, 255), False),
        (f"{LAYER}.mlp.gate.weight", (1, 2), True),
        ("model.language_model.norm.weight", (1,), True),
        ("model.visual.merger.linear_fc2.weight", (0, 1), True),
    ],
)
def test_where_no_model_is_run(
    copy: Path, imatrix: tuple[Path, Path], tmp_path: Path, run: Run, name: str, place: Place, early: bool
) -> None:
    damage(copy, name, place, NAN)
    out = tmp_path / "out"
    assert f"tensor {name} is NaN at" in stopped(run, copy, out, "--calibration-from", imatrix[1])
    assert (out / "calibration.safetensors").exists() is not early
    assert not (out / "sensitivity.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blk.1.ffn_down_exps.weight", "expert 0, row 0, column 0"),
        ("blk.1.ffn_gate_inp.weight", "row 0, column 0"),
        ("output_norm.weight", "[0]"),
        ("token_embd.weight", "row 0, column 0"),
    ],
)
def test_in_a_base_gguf(imatrix: tuple[Path, Path], tmp_path: Path, run: Run, name: str, says: str) -> None:
    base, entries = imatrix
    info = read_header(base).tensors[name]
    with base.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.array([NAN], np.float32).tobytes()[-info.size_bytes // info.n_weights :])
    out = tmp_path / "out"
    line = run("convert", "--base-gguf", base, "--calibration-from", entries, "--bpw", "4", "--out", out, code=4)
    assert f"tensor {name} is NaN at {says}" in line
    assert not list(out.glob("*MODE*.gguf"))


def large_key(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{LAYER}.self_attn.k_proj.weight"][5, 7] = 3e38


def large_norm(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{LAYER}.post_attention_layernorm.weight"][5] = 1e38


def large_expert(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{LAYER}.mlp.experts.down_proj"] *= 1e20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (large_key, r"what blk\.1\.attn_output\.weight reads is NaN or infinite, although .* beyond float32"),
        (large_norm, r"what blk\.1\.ffn_.* beyond float32"),
        (large_expert, r"blk\.1\.ffn_down_exps\.weight.* in row .* cannot be stored as Q"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_overflows_is_said_to(
    copy: Path, tmp_path: Path, run: Run, change: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    weights = weights_of(copy)
    change(weights)
    save_alone(copy, weights)
    line = stopped(run, copy, tmp_path / "out", *samples(2, 2))
    assert re.search(says, line), line
    assert "importance matrix" not in line
