"""The pass that rounds a model's tensors, against moments taken from the whole model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import MissingResourceError
from mode_gguf.feedback.round_layers import RoundingSettings, round_tensors
from mode_gguf.feedback.rounded_tensors import OUTSIDE_LAYERS, RoundedTensors, is_rounded, part_of
from mode_gguf.feedback.second_moments import DAMPING, DOWN_DAMPING, feedback_of, with_shared
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.imatrix import Importance
from mode_gguf.quantization.expert_groups import group_name
from mode_gguf.quantization.packer import pack_by_rows, packed_chunks, read_matrix
from mode_gguf.quantization.packing import DEFAULT_PACKING
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

LAYER = 1


@pytest.fixture(scope="module")
def rounding(
    types: dict[str, QuantType], importance: Importance, token_weights: dict[str, np.ndarray]
) -> RoundingSettings:
    return RoundingSettings(types, importance, DEFAULT_PACKING, token_weights)


@pytest.fixture(scope="module")
def rounded(
    checkpoint: Checkpoint, inputs: list[ModelInputs], rounding: RoundingSettings, tmp_path_factory: Any
) -> RoundedTensors:
    result = RoundedTensors(tmp_path_factory.mktemp("rounding") / "rounded", "key")
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, rounding, result)
    return result


class WholeModel:
    """Inputs of matrices of layer 1 and of the head, of all tokens, from Hugging Face's own forward."""

    def __init__(self, folder: Path, inputs: list[ModelInputs]) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        layer = self.model.model.language_model.layers[LAYER]
        self.experts = layer.mlp.experts
        recorded: dict[str, list[Tensor]] = {"o": [], "head": [], "x": [], "index": [], "weight": []}
        layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: recorded["o"].append(a[0][0]))
        self.model.lm_head.register_forward_hook(lambda m, a, o: recorded["head"].append(a[0][0]))

        def keep(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            for name, argument in zip(("x", "index", "weight"), arguments, strict=True):
                recorded[name].append(argument)

        self.experts.register_forward_hook(keep)
        with torch.no_grad():
            for one in inputs:
                self.model(**one.model_arguments(torch.device("cpu"), torch.float32))
        self.recorded = {name: torch.cat(parts) for name, parts in recorded.items()}

    def routed(self, expert: int, at_block: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs of an expert's tokens, and what they weigh."""
        token, slot = torch.where(self.recorded["index"] == expert)
        weight = torch.from_numpy(at_block)[token] * self.recorded["weight"][token, slot] ** 2
        return self.recorded["x"][token], weight


@pytest.fixture(scope="module")
def whole(pico_module: Path, inputs: list[ModelInputs]) -> WholeModel:
    return WholeModel(pico_module, inputs)


def tensor_of(checkpoint: Checkpoint, name: str) -> SourceTensor:
    return next(tensor for tensor in text_tensors(checkpoint) if tensor.name == name)


def moments_of(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("s,si,sj->ij", weight, x, x)


def expected(
    tensor: SourceTensor,
    index: int,
    h: Tensor,
    types: dict[str, QuantType],
    importance: Importance,
    damping: float = DAMPING,
) -> np.ndarray:
    return pack_by_rows(
        read_matrix(tensor, index),
        types[tensor.name],
        importance[tensor.name][index],
        name="expected",
        packing=DEFAULT_PACKING,
        feedback=feedback_of(h, damping),
    )


def assert_nearly_equal(found: np.ndarray, wanted: np.ndarray) -> None:
    """Sums of another order may turn a tie, and a row's later levels with it."""
    assert found.shape == wanted.shape
    assert (found == wanted).mean() > 0.97


@pytest.mark.parametrize(("name", "read"), [(f"blk.{LAYER}.attn_output.weight", "o"), ("output.weight", "head")])
def test_dense_matrices(
    checkpoint: Checkpoint,
    rounded: RoundedTensors,
    whole: WholeModel,
    types: dict[str, QuantType],
    importance: Importance,
    token_weights: dict[str, np.ndarray],
    name: str,
    read: str,
) -> None:
    tensor = tensor_of(checkpoint, name)
    (found,) = rounded.matrices(part_of(tensor), name)
    weight = torch.from_numpy(token_weights[name])
    assert_nearly_equal(found, expected(tensor, 0, moments_of(whole.recorded[read], weight), types, importance))


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_experts(
    checkpoint: Checkpoint,
    rounded: RoundedTensors,
    whole: WholeModel,
    types: dict[str, QuantType],
    importance: Importance,
    token_weights: dict[str, np.ndarray],
    projection: str,
) -> None:
    tensor = tensor_of(checkpoint, f"blk.{LAYER}.ffn_{projection}_exps.weight")
    at_block = token_weights[f"blk.{LAYER}.ffn_exps"]
    matrices = list(rounded.matrices(part_of(tensor), tensor.name))
    assert len(matrices) == tensor.n_experts
    for expert, found in enumerate(matrices):
        x, weight = whole.routed(expert, at_block)
        damping = DOWN_DAMPING if projection == "down" else DAMPING
        if projection == "down":
            h = moments_of(whole.experts._apply_gate(linear(x, whole.experts.gate_up_proj[expert])).detach(), weight)
        else:
            h = with_shared(moments_of(x, weight), moments_of(whole.recorded["x"], torch.from_numpy(at_block)))
        assert_nearly_equal(found, expected(tensor, expert, h, types, importance, damping))


def test_experts_with_types_of_their_own_are_rounded_as_in_tensors_of_one(
    checkpoint: Checkpoint,
    inputs: list[ModelInputs],
    rounding: RoundingSettings,
    rounded: RoundedTensors,
    tmp_path: Path,
) -> None:
    """Half of the experts in the types of `rounded`, the others in Q3_K throughout, layer by layer."""
    whole = [tensor for tensor in text_tensors(checkpoint) if tensor.role is Role.EXPERT]
    usual = rounding.types
    experts = {
        tensor.name: [usual[tensor.name] if e % 2 else QUANT_TYPES["Q3_K"] for e in range(tensor.n_experts)]
        for tensor in whole
    }
    grouped, uniform = (RoundedTensors(tmp_path / name, "key") for name in ("grouped", "uniform"))
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, replace(rounding, experts=experts), grouped)
    all_q3 = {**usual, **{tensor.name: QUANT_TYPES["Q3_K"] for tensor in whole}}
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, replace(rounding, types=all_q3), uniform)
    for tensor in whole:
        part = part_of(tensor)
        for group, source in enumerate((uniform, rounded)):
            found = list(grouped.matrices(part, group_name(tensor.name, group)))
            wanted = list(source.matrices(part, tensor.name))[group::2]
            assert len(found) == len(wanted) == tensor.n_experts // 2
            np.testing.assert_array_equal(np.stack(found), np.stack(wanted))


def test_parts_hold_exactly_what_has_feedback(
    checkpoint: Checkpoint, rounded: RoundedTensors, types: dict[str, QuantType]
) -> None:
    for tensor in text_tensors(checkpoint):
        if is_rounded(tensor, types):
            assert len(list(rounded.matrices(part_of(tensor), tensor.name))) == tensor.n_experts
    roles = {tensor.role for tensor in text_tensors(checkpoint) if is_rounded(tensor, types)}
    assert roles == {Role.EXPERT, Role.DENSE, Role.OUTPUT}
    assert not any("attn_q" in name for name in rounded.nearest(f"blk.{LAYER}"))
    assert set(rounded.nearest(OUTSIDE_LAYERS)) == {"output.weight"}


def test_threads_do_not_change_the_bytes(
    checkpoint: Checkpoint,
    inputs: list[ModelInputs],
    rounding: RoundingSettings,
    rounded: RoundedTensors,
    tmp_path: Path,
) -> None:
    other = RoundedTensors(tmp_path / "rounded", "key")
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, replace(rounding, threads=3), other)
    for file in rounded.path.iterdir():
        assert (other.path / file.name).read_bytes() == file.read_bytes()


def test_only_missing_layers_are_rounded_again(
    checkpoint: Checkpoint,
    inputs: list[ModelInputs],
    rounding: RoundingSettings,
    rounded: RoundedTensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = RoundedTensors(tmp_path / "rounded", "key")
    other.path.mkdir()
    for file in rounded.path.iterdir():
        (other.path / file.name).write_bytes(file.read_bytes())
    missing = other.path / f"blk.{LAYER}.safetensors"
    before = missing.read_bytes()
    missing.unlink()
    times = {file.name: file.stat().st_mtime_ns for file in other.path.iterdir()}
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, rounding, other)
    assert missing.read_bytes() == before
    assert {name: (other.path / name).stat().st_mtime_ns for name in times} == times

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr("mode_gguf.feedback.round_layers.run_recorded", never)
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, rounding, other)


def test_experts_that_few_tokens_reach_are_rounded_to_nearest(
    checkpoint: Checkpoint,
    inputs: list[ModelInputs],
    rounding: RoundingSettings,
    token_weights: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """A single token with all the weight makes the others irrelevant."""
    entry = f"blk.{LAYER}.ffn_exps"
    lonely = np.zeros_like(token_weights[entry])
    lonely[0] = 1
    weights = {**token_weights, entry: lonely}
    result = RoundedTensors(tmp_path / "rounded", "key")
    round_tensors(open_streamed(checkpoint, "cpu"), inputs, replace(rounding, token_weights=weights), result)
    tensor = tensor_of(checkpoint, f"blk.{LAYER}.ffn_down_exps.weight")
    assert result.nearest(f"blk.{LAYER}")[tensor.name] == tensor.n_experts
    plain = packed_chunks(tensor, rounding.types[tensor.name], rounding.importance[tensor.name], 1, DEFAULT_PACKING)
    for found, wanted in zip(result.matrices(part_of(tensor), tensor.name), plain, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_tensors_of_another_plan_are_not_taken(rounded: RoundedTensors) -> None:
    other = RoundedTensors(rounded.path, "another key")
    assert rounded.has(OUTSIDE_LAYERS)
    assert not other.has(OUTSIDE_LAYERS)
    with pytest.raises(MissingResourceError, match=r"outside\.safetensors: not there, or of another plan; run `mode-"):
        next(other.matrices(OUTSIDE_LAYERS, "output.weight"))
