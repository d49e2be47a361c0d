"""Latent attention and shared experts: what is measured of them is right, and the absorbed matrices stay out of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.key_tokens import TEXT_ATTENTION
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.variants import Variant
from mode_gguf.importance.weight_errors import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES

CPU = torch.device("cpu")
TYPE = QUANT_TYPES["Q8_0"]
NAMES = ("blk.1.attn_q_a.weight", "blk.1.attn_q_b.weight", "blk.1.attn_kv_a_mqa.weight", "blk.2.ffn_down_shexp.weight")


def test_kl_of_latent_attention_and_shared_experts(pico_mistral4: Path, samples: list[Sample]) -> None:
    """The KL of one matrix's change in the streamed model, against the whole model's; a plan's base may have types of
    matrices that are not measured."""
    checkpoint = Checkpoint.open(pico_mistral4)
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(sample) for sample in samples[:2]]
    tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    variants = [Variant(name, {name: (TYPE,)}) for name in NAMES]
    settings = KlSettings({}, EXACT, TEXT_ATTENTION)
    measured = quantized_kl(open_streamed(checkpoint, "cpu"), inputs, variants, settings).variants
    base = {name: (TYPE,) for name, tensor in tensors.items() if tensor.role is Role.ABSORBED}
    with_base = quantized_kl(open_streamed(checkpoint, "cpu"), inputs, variants, settings, base=base)
    assert not with_base.base.any()
    np.testing.assert_allclose(with_base.variants, measured, rtol=1e-6)
    model: Any = AutoModelForImageTextToText.from_pretrained(pico_mistral4, dtype=torch.float32).eval()

    @torch.no_grad()
    def predictions() -> Tensor:
        logits = [model(**one.model_arguments(CPU, torch.float32)).logits[0, one.scored] for one in inputs]
        return torch.cat(logits).double().log_softmax(-1)

    full = predictions()
    for name, found in zip(NAMES, measured, strict=True):
        change = change_of_weights(tensors[name], 0, TYPE, {}, EXACT, CPU)
        source = tensors[name].sources[0].replace("language_model.model.", "model.language_model.")
        weight = model.get_submodule(source.removesuffix(".weight")).weight.data
        weight += change
        kl = float((full.exp() * (full - predictions())).sum(-1).mean())
        weight -= change
        assert found[0] == pytest.approx(kl, rel=2e-3), name
