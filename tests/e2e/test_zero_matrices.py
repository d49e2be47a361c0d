"""Models with all-zero matrices, as pruning, identity blocks and upcycling leave them, and far too large weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.importance.sensitivity_table import SensitivityTable
from tests.e2e.conftest import QUICK, SMALL, Ended, Run, samples, settings
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

Weights = dict[str, torch.Tensor]

BLOCK = "model.language_model.layers.1."
"""The layer that is changed."""
SMALLEST = "Q2_K"


def block(weights: Weights) -> None:
    """Masked pruning of a whole layer, its router included."""
    for name, tensor in weights.items():
        if name.startswith(BLOCK) and "norm" not in name:
            tensor.zero_()


def identity(weights: Weights) -> None:
    """A layer that adds nothing: LLaMA-Pro's, and zero-initialised upcycling's."""
    weights[f"{BLOCK}self_attn.o_proj.weight"].zero_()
    weights[f"{BLOCK}mlp.experts.down_proj"].zero_()


def experts(weights: Weights) -> None:
    """Two of a layer's experts."""
    for projection in ("gate_up_proj", "down_proj"):
        weights[f"{BLOCK}mlp.experts.{projection}"][1:3] = 0


def padding(weights: Weights) -> None:
    """Rows of the vocabulary, rows and columns of matrices, and an encoder without weights."""
    weights["model.language_model.embed_tokens.weight"][-100:] = 0
    weights["lm_head.weight"][-100:] = 0
    weights[f"{BLOCK}self_attn.q_proj.weight"][:40] = 0
    weights[f"{BLOCK}self_attn.o_proj.weight"][:, -40:] = 0
    for name, tensor in weights.items():
        if "visual" in name:
            tensor.zero_()


def head(weights: Weights) -> None:
    weights["lm_head.weight"].zero_()


def written(folder: Path, change: Callable[[Weights], None]) -> Path:
    write_pico_qwen3vlmoe(folder, shards=1)
    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def checked_plan(out: Path, result: str) -> Plan:
    """The plan, once everything measured and written is known to be numbers."""
    facts = json.loads(result)
    for path in (Path(facts["model"]), Path(facts["mmproj"])):
        for tensor in GGUFReader(path).tensors:
            if tensor.tensor_type.name != "I32":
                assert np.isfinite(quants.dequantize(tensor.data, tensor.tensor_type)).all(), tensor.name
    table = SensitivityTable.load(out / "sensitivity.safetensors")
    for name, values in table.arrays.items():
        assert np.isfinite(values).all(), name
    return Plan.load(out / "plan.json")


@pytest.mark.parametrize("change", [block, identity])
def test_layers_without_weights_take_the_smallest_types(
    change: Callable[[Weights], None], tmp_path: Path, run: Run
) -> None:
    """Feedback, refinement and validation go through; a budget beyond what the others can take is not spent on them."""
    model, out = written(tmp_path / "model", change), tmp_path / "work"
    few = ("--out", out, *samples(2, 2), "--json")
    few = (*few, *settings("calibration.seed=1", "sensitivity.measured_samples=2"))
    plan = checked_plan(out, run("convert", model, "--bpw", "3.5", *few, *settings("plan.refine=1")))
    zeros = [name for name in plan.types if name.startswith("blk.1.") and ("attn_output" in name or "ffn_down" in name)]
    zeros += [name for name in plan.types if name.startswith("blk.1.ffn_gate_exps")]
    assert {plan.types[name].name for name in zeros} == {SMALLEST}
    costs = {tensor.name: tensor.cost for tensor in plan.tensors}
    assert {costs[name] for name in zeros} == {0.0}
    plan = checked_plan(out, run("convert", model, "--bpw", "6.0", *few, "--no-validate"))
    assert plan.types["blk.1.ffn_down_exps.weight"].name == SMALLEST
    assert plan.types["blk.0.ffn_down_exps.weight"].name == "Q6_K"


def test_experts_without_weights_take_the_smallest_type(tmp_path: Path, run: Run) -> None:
    model, out = written(tmp_path / "model", experts), tmp_path / "work"
    few = ("--bpw", "3.5", "--out", out, *SMALL, "--no-validate", "--json")
    for preset in ("mode", "paper"):
        asked = ("convert", model, *few, "--preset", preset, "--granularity", "expert")
        plan = checked_plan(out / preset, run(*asked, "--out", out / preset))
        for projection in ("gate", "up", "down"):
            types = [one.name for one in plan.experts[f"blk.1.ffn_{projection}_exps.weight"]]
            assert types[1:3] == ["IQ2_XXS"] * 2


@pytest.mark.parametrize("change", [padding, head])
def test_what_is_zero_in_part_converts(change: Callable[[Weights], None], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "work"
    few = ("--bpw", "4.0", "--out", out, *SMALL, "--json")
    plan = checked_plan(out, run("convert", written(tmp_path / "model", change), *few))
    assert plan.solver is not None
    assert (plan.solver.objective == 0) == (change is head)


def test_zeros_with_an_importance_matrix_of_zeros(tmp_path: Path, run: Run) -> None:
    """llama-imatrix sums up zeros where the experts before are zeros."""
    model, out = written(tmp_path / "model", block), tmp_path / "work"
    entries = {}
    for tensor in text_tensors(Checkpoint.open(model)):
        if tensor.activation is not None:
            shape = (tensor.n_experts, tensor.row_width)
            sums = np.zeros(shape) if "blk.1." in tensor.name else np.ones(shape)
            entries[tensor.name] = (sums, np.ones(tensor.n_experts))
    write_imatrix(tmp_path / "imatrix.gguf", entries, ("d",), 1, 10)
    given = ("--calibration-from", tmp_path / "imatrix.gguf", "--bpw", "4.0", "--out", out, "--json", "--no-validate")
    plan = checked_plan(out, run("convert", model, *given))
    assert plan.types["blk.1.ffn_up_exps.weight"].name == SMALLEST


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        (f"{BLOCK}self_attn.q_proj.weight", (3, 5), 1e30, "blk.1.attn_q.weight: .* in row 3, column 5"),
        (f"{BLOCK}mlp.experts.down_proj", (1, 3, 5), 1e30, "blk.1.ffn_down_exps.weight: .* in row 5, column 3"),
        ("lm_head.weight", (3, 5), 1e7, "output.weight: 10027008.0 in row 3, column 5"),
    ],
    ids=["attention", "expert", "head"],
)
def test_weights_beyond_the_scales_of_types_are_refused(
    name: str, place: tuple[int, ...], value: float, message: str, tmp_path: Path, ended: Ended
) -> None:
    def huge(weights: Weights) -> None:
        weights[name][place] = value

    few = ("--bpw", "3.5", "--out", tmp_path / "work", *SMALL, "--no-validate")
    _, errors = ended("convert", written(tmp_path / "model", huge), *few, code=4)
    assert re.search(message + " cannot be stored as Q[0-9]_[0K]; choose F32", errors[0])
    assert not list((tmp_path / "work").glob("model-*.gguf"))


def test_an_encoder_beyond_float16_is_refused_before_anything_is_measured(tmp_path: Path, run: Run) -> None:
    def large(weights: Weights) -> None:
        weights["model.visual.blocks.0.attn.proj.weight"][3, 5] = 1e5

    out = tmp_path / "work"
    few = ("--bpw", "4.0", "--out", out, *QUICK, "--no-validate", "--json")
    model = written(tmp_path / "model", large)
    line = run("convert", model, *few, code=4)
    assert "model.visual.blocks.0.attn.proj.weight has weights up to 9.98e+04, which overflow F16" in line
    assert "--mmproj-type BF16 or F32" in line
    assert not list(out.glob("*.safetensors"))
    checked_plan(out, run("convert", model, *few, "--mmproj-type", "BF16"))
