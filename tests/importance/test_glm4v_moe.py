"""Dense first layers, and the shared experts of others: what is measured of them is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.inputs import InputBuilder
from mode_gguf.calibration.key_tokens import TEXT_ATTENTION
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.measurement import MeasurementSettings
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.type_changes import Variant
from mode_gguf.importance.weight_changes import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from tests.families.pico.glm4v_moe import EXPERTS, write_pico_glm4v_moe

CPU = torch.device("cpu")
TYPE = QUANT_TYPES["Q8_0"]
NAMES = ("blk.0.ffn_down.weight", "blk.0.ffn_gate.weight", "blk.3.attn_k.weight", "blk.3.ffn_up_shexp.weight")


def test_kl_and_fisher_of_dense_layers_and_shared_experts(tmp_path: Path, samples: list[Sample]) -> None:
    """The KL of one matrix's change, in the streamed model and from gradients, against the whole model's.

    Every token goes to every expert: that a change sends some elsewhere, no gradient sees.
    """
    folder = write_pico_glm4v_moe(tmp_path / "pico", num_experts_per_tok=EXPERTS)
    checkpoint = Checkpoint.open(folder)
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(sample) for sample in samples[:2]]
    variants = [Variant(name, {name: (TYPE,)}) for name in NAMES]
    settings = KlSettings({}, EXACT, TEXT_ATTENTION)
    measured = quantized_kl(open_streamed(checkpoint, "cpu"), inputs, variants, settings).variants[:, 0]
    fisher = fisher_sensitivity(
        open_streamed(checkpoint, "cpu"),
        inputs,
        MeasurementSettings((TYPE,), (TYPE,), {}, TEXT_ATTENTION, draws=16, seed=0),
    )
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def predictions() -> Tensor:
        logits = [model(**one.model_arguments(CPU, torch.float32)).logits[0, one.scored] for one in inputs]
        return torch.cat(logits).double().log_softmax(-1)

    full = predictions()
    tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    for name, found in zip(NAMES, measured, strict=True):
        change = change_of_weights(tensors[name], 0, TYPE, {}, EXACT, CPU)
        weight = model.get_submodule(tensors[name].sources[0].removesuffix(".weight")).weight.data
        weight += change
        kl = float((full.exp() * (full - predictions())).sum(-1).mean())
        weight -= change
        assert found == pytest.approx(kl, rel=2e-3), name
        predicted = float(fisher.arrays[f"{name}.unit"][0, :, 0].sum())
        assert 0.5 * kl < predicted < 2 * kl, name
