"""Fused gate and up, keys that are values, scaled embeddings, bent logits: what is measured of them is right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.calibration.inputs import InputBuilder
from mode_gguf.calibration.key_tokens import TEXT_ATTENTION
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.measurement import MeasurementSettings
from mode_gguf.importance.output_error import block_mse
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.type_changes import Variant
from mode_gguf.importance.weight_changes import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from tests.families.pico.gemma4_moe import EXPERTS, HIDDEN, WIDTH

CPU = torch.device("cpu")
TYPE = QUANT_TYPES["Q8_0"]
"""A change so small that few tokens go to other experts for it, which no gradient sees."""
NAMES = (
    *("blk.3.ffn_gate_up_exps.weight", "blk.3.ffn_down_exps.weight", "blk.3.attn_k.weight", "blk.2.ffn_down.weight"),
    "token_embd.weight",
)


def test_kl_and_fisher_against_the_whole_model(pico_gemma4: Path, samples: list[Sample]) -> None:
    """The KL of one tensor's change, in the streamed model and from gradients, against the whole model's."""
    checkpoint = Checkpoint.open(pico_gemma4)
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(samples[number]) for number in (1, 4)]
    tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    variants = [Variant(name, {name: (TYPE,) * tensors[name].n_experts}) for name in NAMES]
    measured = quantized_kl(open_streamed(checkpoint, "cpu"), inputs, variants, KlSettings({}, EXACT, TEXT_ATTENTION))
    settings = MeasurementSettings((TYPE,), (TYPE,), {}, TEXT_ATTENTION, draws=8, seed=0)
    fisher = fisher_sensitivity(open_streamed(checkpoint, "cpu"), inputs, settings)
    model: Any = AutoModelForImageTextToText.from_pretrained(pico_gemma4, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def predictions() -> list[Tensor]:
        logits = [model(**one.model_arguments(CPU, torch.float32)).logits[0, one.scored] for one in inputs]
        return [torch.cat(parts).double().log_softmax(-1) for parts in (logits[:1], logits[1:])]

    full = predictions()
    for name, found in zip(NAMES, measured.variants, strict=True):
        tensor = tensors[name]
        changes = [change_of_weights(tensor, expert, TYPE, {}, EXACT, CPU) for expert in range(tensor.n_experts)]
        weight = parameters[tensor.sources[0]].data
        change = torch.stack(changes).view(weight.shape)
        weight += change
        kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(full, predictions(), strict=True)]
        weight -= change
        assert found == pytest.approx(kl, rel=5e-3), name
        predicted = fisher.arrays[f"{name}.unit"][..., 0].sum(axis=1)
        ratio = predicted / np.array(kl)
        if name == "token_embd.weight":
            ratio = ratio[1:]  # in the text, a token does go to another expert
        assert ((ratio > 0.4) & (ratio < 2.5)).all(), name


def test_arrays_of_fused_experts(pico_gemma4: Path, samples: list[Sample]) -> None:
    """A tensor each for what the experts read and for what they hand on, and one of both."""
    checkpoint = Checkpoint.open(pico_gemma4)
    inputs = [InputBuilder.open(checkpoint).build(sample) for sample in samples[:1]]
    result = block_mse(
        open_streamed(checkpoint, "cpu"), inputs, MeasurementSettings((TYPE,), (TYPE,), {}, TEXT_ATTENTION, 1, 0)
    )
    for name in ("ffn_gate_up_exps.weight", "ffn_down_exps.weight", "ffn_exps"):
        values = result.arrays[f"blk.0.{name}.expert"]
        assert values.shape == (1, 3, EXPERTS, 1)
        assert (values[0, 0, :, 0] > 0).all()
        assert (f"blk.0.{name}.unit" in result.arrays) == (name != "ffn_exps")
    errors = [result.arrays[f"blk.0.{name}.weight_error"] for name in ("ffn_gate_up_exps.weight", "ffn_exps")]
    assert (errors[1] > errors[0]).all()
    experts = [tensor for tensor in text_tensors(checkpoint) if tensor.role is Role.EXPERT and tensor.layer == 0]
    assert [tensor.shape for tensor in experts] == [(EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
