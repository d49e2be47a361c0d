"""Unit KL: the KL of each tensor in each candidate type, measured instead of predicted.

A unit is a whole tensor: one projection of a layer's experts, a matrix, the embedding, the head. There are few of them,
so that a suffix of the model can be run for each one, type and modality (`quantized_kl`). Single experts are too many;
`unit_kl_table.split_over_experts` gives them their costs of another table, scaled to their tensor's measured KL.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.artifacts import SCHEMAS, fingerprint, read_arrays, write_arrays
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import UsageError
from mode_gguf.forward.denormals import denormals_flushed
from mode_gguf.forward.inputs import ModelInputs, model_inputs
from mode_gguf.forward.streaming import StreamedModel, open_streamed
from mode_gguf.importance.group_sums import N_ANSWERS, N_MODALITIES
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.unit_kl_table import KIND, UnitKl
from mode_gguf.importance.variants import Variant
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.fallback_types import stored_as
from mode_gguf.quantization.types import QuantType
from mode_gguf.vocabulary import ImatrixKind


@dataclass(frozen=True, slots=True)
class KlModel:
    """A checkpoint opened for measuring, with the samples it is measured on; make one with `open_kl_model`.

    Attributes:
        samples: digest of the samples' inputs.
    """

    checkpoint: Checkpoint
    streamed: StreamedModel
    inputs: Sequence[ModelInputs]
    samples: str


def open_kl_model(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    device: str = "auto",
) -> KlModel:
    """Open `checkpoint` in float32 on any device: KLs of 1e-5 are far below what bfloat16 can tell.

    Raises:
        UsageError: no samples, or an unknown device.
        InputError: model or sample cannot be used.
    """
    if not samples:
        raise UsageError("measuring KL needs at least one sample")
    inputs = model_inputs(checkpoint, samples)
    digest = fingerprint([(one.origin, one.input_ids.tolist(), one.scored.tolist()) for one in inputs])
    return KlModel(checkpoint, open_streamed(checkpoint, device, torch.float32), inputs, digest)


def stratified(samples: Sequence[Sample], budget: int, seed: int = 0) -> list[Sample]:
    """Stratified draw of at most `budget` samples, half with an image as far as there are; in their own order.

    Raises:
        UsageError: a budget below one.
    """
    if budget < 1:
        raise UsageError(f"sample budget is {budget}: at least one is needed")
    strata = [[i for i, sample in enumerate(samples) if sample.has_image is image] for image in (False, True)]
    of_text = min(len(strata[0]), max(budget - budget // 2, budget - len(strata[1])))
    counts = (of_text, min(len(strata[1]), budget - of_text))
    drawn = [random.Random(seed).sample(stratum, count) for stratum, count in zip(strata, counts, strict=True)]
    return [samples[i] for i in sorted(index for stratum in drawn for index in stratum)]


@denormals_flushed()
def measure_unit_kl(
    model: KlModel,
    settings: KlSettings,
    *,
    expert_types: Sequence[QuantType],
    dense_types: Sequence[QuantType],
    imatrix: ImatrixKind,
    seed: int,
    partial: Path | None = None,
    progress: Progress = silent,
) -> UnitKl:
    """Measure every unit at every type and modality, one pass over the layers for each layer's units.

    Args:
        settings: its importance is the one that `imatrix` names.
        seed: of the choice of the model's samples, for the record.
        partial: file that keeps what is finished, so that a rerun with the same inputs continues; removed at the end.
    """
    streamed, packing = model.streamed, settings.packing
    names = [[quant_type.name for quant_type in types] for types in (expert_types, dense_types)]
    key = fingerprint(
        model.checkpoint.fingerprint,
        model.samples,
        names,
        imatrix,
        asdict(packing),
        asdict(settings.key_tokens),
        SCHEMAS[KIND],
    )
    arrays = _finished_arrays(partial, key)
    passes = _passes(streamed.tensors)
    for number, tensors in enumerate(passes):
        if all(f"{tensor.name}.unit" in arrays for tensor in tensors):
            continue
        types = {t.name: expert_types if t.role is Role.EXPERT else dense_types for t in tensors}
        description = f"measuring units, pass {number + 1} of {len(passes)}"
        arrays |= _measure(model, settings, tensors, types, description, progress)
        if partial is not None:
            write_arrays(partial, arrays, {"kind": f"{KIND}-partial", "key": key})
    positions = [sum(len(one.scored) for one in model.inputs if one.answer == a) for a in range(N_ANSWERS)]
    if partial is not None:
        partial.unlink(missing_ok=True)
    return UnitKl(
        model=model.checkpoint.name,
        fingerprint=model.checkpoint.fingerprint,
        expert_types=tuple(names[0]),
        dense_types=tuple(names[1]),
        arrays=arrays,
        positions=tuple(positions),
        seed=seed,
        imatrix=imatrix,
        packing=packing,
    )


def _finished_arrays(partial: Path | None, key: str) -> dict[str, np.ndarray]:
    """Arrays of an earlier run that was cut off, if it measured the same."""
    if partial is None or not partial.exists():
        return {}
    arrays, metadata = read_arrays(partial, f"{KIND}-partial")
    return arrays if metadata["key"] == key else {}


def _passes(tensors: Sequence[SourceTensor]) -> list[list[SourceTensor]]:
    """Units of each pass, by layer; those outside the layers first. A pass is measured and saved as a whole."""
    units = [tensor for tensor in tensors if tensor.is_measured]
    layers = sorted({-1 if tensor.layer is None else tensor.layer for tensor in units})
    return [[t for t in units if (-1 if t.layer is None else t.layer) == layer] for layer in layers]


def _measure(
    model: KlModel,
    settings: KlSettings,
    tensors: Sequence[SourceTensor],
    types: Mapping[str, Sequence[QuantType]],
    description: str,
    progress: Progress,
) -> dict[str, np.ndarray]:
    stored = {tensor.name: [stored_as(tensor, quant_type) for quant_type in types[tensor.name]] for tensor in tensors}
    cells = [
        (tensor, m, quant_type)
        for tensor in tensors
        for quant_type in dict.fromkeys(stored[tensor.name])
        if quant_type is not None
        for m in range(N_MODALITIES)
    ]
    variants = [
        Variant(f"{tensor.name} in {quant_type.name}", {tensor.name: (quant_type,) * tensor.n_experts}, m)
        for tensor, m, quant_type in cells
    ]
    measured = quantized_kl(
        model.streamed, model.inputs, variants, settings, description=description, progress=progress
    )
    arrays = {
        f"{tensor.name}.unit": np.full((N_ANSWERS, N_MODALITIES, len(types[tensor.name])), np.nan) for tensor in tensors
    }
    for (tensor, m, quant_type), found in zip(cells, measured.variants, strict=True):
        columns = [t for t, one in enumerate(stored[tensor.name]) if one == quant_type]
        arrays[f"{tensor.name}.unit"][:, m, columns] = found[:, None]
    return arrays
