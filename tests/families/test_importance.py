"""What sensitivity measures of every family is right: the KL of one tensor's change against the whole model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.sensitivity_settings import SensitivityRequest, SensitivitySettings
from mode_gguf.importance.variants import Variant
from mode_gguf.importance.weight_errors import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from tests.families.cases import cases_with
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.parameters import parameters_by_source
from tests.importance.conftest import answered_samples

CPU = torch.device("cpu")
TYPE = QUANT_TYPES["Q8_0"]
"""A change so small that few tokens go to other experts for it, which no gradient sees."""


@cases_with("measured")
def test_kl_and_fisher(case: FamilyCase, families: Families, tmp_path: Path) -> None:
    """In the streamed model and from gradients, of texts and of answers about pictures."""
    assert case.measured is not None
    checkpoint = families.checkpoint(case.layouts[0])
    if case.measured.options:
        checkpoint = Checkpoint.open(case.write(tmp_path / "pico", **case.measured.options))
    builder, samples = InputBuilder.open(checkpoint), answered_samples()
    inputs = [builder.build(samples[number]) for number in case.measured.samples]
    kinds = sorted({one.answer for one in inputs})
    tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    variants = [Variant(name, {name: (TYPE,) * tensors[name].n_experts}) for name in case.measured.names]
    measured = quantized_kl(open_streamed(checkpoint, "cpu"), inputs, variants, KlSettings({}, EXACT, TEXT_ATTENTION))
    request = SensitivityRequest((TYPE,), (TYPE,), label_draws=case.measured.draws)
    settings = SensitivitySettings(request, {}, TEXT_ATTENTION)
    fisher = fisher_sensitivity(open_streamed(checkpoint, "cpu"), inputs, settings)
    model = case.load(checkpoint.path, checkpoint)
    parameters = parameters_by_source(checkpoint, dict(model.named_parameters()))
    full = predictions(model, inputs)
    for name, found in zip(case.measured.names, measured.variants, strict=True):
        weight = model.get_parameter(parameters[tensors[name].sources[0]]).data
        change = change_in_the_module(tensors[name], weight)
        weight += change
        moved = predictions(model, inputs)
        weight -= change
        predicted = fisher.arrays[f"{name}.unit"][..., 0].sum(axis=1)
        for kind in kinds:
            kl = float((full[kind].exp() * (full[kind] - moved[kind])).sum(-1).mean())
            assert found[kind] == pytest.approx(kl, rel=case.measured.rtol), name
            if (name, kind) not in case.measured.reroutes:
                least, most = case.measured.fisher
                assert least * kl < predicted[kind] < most * kl, name


@torch.no_grad()
def predictions(model: Any, inputs: list[ModelInputs]) -> dict[int, Tensor]:
    """Log-probabilities at all scored positions, by kind of sample."""
    logits: dict[int, list[Tensor]] = {}
    for one in inputs:
        rows = model(**one.model_arguments(CPU, torch.float32)).logits[0, one.scored]
        logits.setdefault(one.answer, []).append(rows)
    return {kind: torch.cat(rows).double().log_softmax(-1) for kind, rows in logits.items()}


def change_in_the_module(tensor: SourceTensor, weight: Tensor) -> Tensor:
    """What quantization does to a parameter, in the parameter's own order of rows and columns."""
    changes = [change_of_weights(tensor, expert, TYPE, {}, EXACT, CPU) for expert in range(tensor.n_experts)]
    change = torch.stack(changes).view(weight.shape)
    if tensor.order is None:
        return change
    rows, columns = (
        np.arange(n) if order is None else np.asarray(order)
        for n, order in zip(change.shape, (tensor.order.rows, tensor.order.columns), strict=True)
    )
    moved = torch.zeros_like(change)
    moved[torch.as_tensor(rows)[:, None], torch.as_tensor(columns)] = change
    return moved
