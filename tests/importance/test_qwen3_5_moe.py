"""Matrices that are stored in another order than torch's, and shared experts: what is measured of them is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.key_tokens import TEXT_ATTENTION
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.sensitivity_settings import SensitivitySettings
from mode_gguf.importance.variants import Variant
from mode_gguf.importance.weight_errors import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES

CPU = torch.device("cpu")
TYPE = QUANT_TYPES["Q8_0"]
"""A change so small that few tokens go to other experts for it, which no gradient sees."""
NAMES = ("blk.4.attn_qkv.weight", "blk.4.attn_gate.weight", "blk.4.ssm_out.weight", "blk.4.ffn_down_shexp.weight")


def test_kl_and_fisher_of_reordered_matrices_and_shared_experts(pico_qwen3_5: Path, samples: list[Sample]) -> None:
    """The KL of one matrix's change, in the streamed model and from gradients, against the whole model's."""
    checkpoint = Checkpoint.open(pico_qwen3_5)
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(sample) for sample in samples[:2]]
    streamed = open_streamed(checkpoint, "cpu")
    variants = [Variant(name, {name: (TYPE,)}) for name in NAMES]
    measured = quantized_kl(streamed, inputs, variants, KlSettings({}, EXACT, TEXT_ATTENTION)).variants[:, 0]
    fisher = fisher_sensitivity(
        open_streamed(checkpoint, "cpu"),
        inputs,
        SensitivitySettings((TYPE,), (TYPE,), {}, TEXT_ATTENTION, draws=16, seed=0),
    )
    model: Any = AutoModelForImageTextToText.from_pretrained(pico_qwen3_5, dtype=torch.float32).eval()

    @torch.no_grad()
    def predictions() -> Tensor:
        logits = [model(**one.model_arguments(CPU, torch.float32)).logits[0, one.scored] for one in inputs]
        return torch.cat(logits).double().log_softmax(-1)

    full = predictions()
    tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    for name, found in zip(NAMES, measured, strict=True):
        tensor = tensors[name]
        change = change_of_weights(tensor, 0, TYPE, {}, EXACT, CPU)
        moved = torch.zeros_like(change)
        rows = torch.arange(len(change)) if tensor.order is None or tensor.order.rows is None else tensor.order.rows
        columns = slice(None) if tensor.order is None or tensor.order.columns is None else tensor.order.columns
        moved[torch.as_tensor(rows)[:, None], torch.arange(change.shape[1])[columns]] = change
        weight = model.get_submodule(tensor.sources[0].removesuffix(".weight")).weight.data
        weight += moved
        kl = float((full.exp() * (full - predictions())).sum(-1).mean())
        weight -= moved
        assert found == pytest.approx(kl, rel=2e-3), name
        predicted = float(fisher.arrays[f"{name}.unit"][0, :, 0].sum())
        assert 0.6 * kl < predicted < 1.7 * kl, name
