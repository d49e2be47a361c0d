"""Costs from an importance matrix alone: no model runs, and torch is not needed.

A matrix W with mean squared inputs h loses in a type the share sum h (W - Wq)^2 / sum h W^2 of its output's energy, as
far as inputs are uncorrelated. Experts of one tensor are added up by their tokens before they are divided, so that an
expert counts as much as it is used. Every tensor's share counts alike: what a loss there does to the model's answers,
gradients would tell, and there are none. The token embedding, and what the importance matrix leaves out, are weighed
without importance.

An importance matrix does not tell text from images, so neither do these costs: all tokens stand under `text`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.forward.modality import MODALITIES, TEXT
from mode_gguf.importance.known_sums import known_sum
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
from mode_gguf.importance.sensitivity_table import SensitivityTable, check_costs
from mode_gguf.options import Packing
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.fallback_types import fallback_types_of, stored_as
from mode_gguf.quantization.ordered_parallel import ordered_parallel
from mode_gguf.quantization.packer import pack_matrix, unpack_matrix
from mode_gguf.quantization.types import QuantType


def imatrix_error(
    model: str,
    fingerprint: str,
    tensors: Sequence[SourceTensor],
    importance: Mapping[str, np.ndarray],
    counts: Mapping[int, np.ndarray],
    request: SensitivityRequest,
    threads: int | None = None,
    progress: Progress = silent,
) -> SensitivityTable:
    """Sensitivity table of the relative error of every tensor's output at every candidate type.

    Args:
        importance: float32 (E, n) by tensor name, what candidates are packed with.
        counts: tokens of every expert (E,), by layer; an expert without any counts as one token.
        request: candidates and how the file will be packed; its method is ignored.
        threads: that pack; None for all cores.

    Raises:
        InputError: an error is beyond float32, or a weight is NaN or infinite.
    """
    arrays: dict[str, np.ndarray] = {}
    measured = [tensor for tensor in tensors if tensor.role in (Role.EXPERT, Role.DENSE, Role.EMBEDDING, Role.OUTPUT)]
    parts: dict[int, list[np.ndarray]] = {}
    part_errors: dict[int, list[np.ndarray]] = {}
    with progress.step("sensitivity", sum(tensor.n_experts for tensor in measured), "matrices") as done:
        for tensor in measured:
            is_expert = tensor.role is Role.EXPERT
            types = request.expert_types if is_expert else request.dense_types
            columns = importance.get(tensor.name)
            rows = []
            for row in _errors(tensor, types, columns, request.packing, threads or os.cpu_count() or 1):
                rows.append(row)
                done(1)
            sums = np.array(rows)  # (E, 2 T + 2): errors and energy with importance, then without
            n_types = len(types)
            error, energy = sums[:, :n_types], sums[:, n_types]
            plain, square = sums[:, n_types + 1 : -1], sums[:, -1]
            tokens = np.maximum(counts[tensor.layer or 0], 1.0) if is_expert else np.ones(1)
            share = tokens[:, None] * error / max(float(tokens @ energy), np.finfo(np.float64).tiny)
            arrays[f"{tensor.name}.unit"] = _text_only(share.sum(axis=0))
            relative = plain / np.maximum(square, np.finfo(np.float64).tiny)[:, None]
            arrays[f"{tensor.name}.weight_error"] = relative
            if is_expert:
                arrays[f"{tensor.name}.expert"] = _text_only(share)
                parts.setdefault(tensor.layer or 0, []).append(share)
                part_errors.setdefault(tensor.layer or 0, []).append(relative)
            check_costs(arrays, tensor, types, [stored_as(tensor, one) is not None for one in types])
    for layer, shares in parts.items():
        arrays[f"blk.{layer}.ffn_exps.expert"] = _text_only(known_sum(shares))
        arrays[f"blk.{layer}.ffn_exps.weight_error"] = known_sum(part_errors[layer])
    return SensitivityTable(
        model=model,
        fingerprint=fingerprint,
        method="imatrix-error",
        expert_types=tuple(quant_type.name for quant_type in request.expert_types),
        dense_types=tuple(quant_type.name for quant_type in request.dense_types),
        arrays=arrays,
        positions=(0,),
        draws=0,
        seed=0,
        estimated={},
        imatrix="plain",
        packing=request.packing,
        fallback_types=fallback_types_of(
            [tensor for tensor in measured if tensor.role is Role.EXPERT], request.expert_types
        )
        | fallback_types_of([tensor for tensor in measured if tensor.role is not Role.EXPERT], request.dense_types),
    )


def _errors(
    tensor: SourceTensor,
    types: Sequence[QuantType],
    importance: np.ndarray | None,
    packing: Packing,
    threads: int,
) -> Iterator[np.ndarray]:
    """Errors by type and energy of each matrix, weighed by importance; then the same without."""
    stored = [stored_as(tensor, quant_type) for quant_type in types]

    def measure(index: int) -> np.ndarray:
        matrix = as_float32(tensor.read(index)).reshape(-1, tensor.row_width)
        columns = None if importance is None else importance[index]
        weights = np.ones(tensor.row_width) if columns is None else columns.astype(np.float64)
        errors = np.full((2, len(types)), np.nan)
        for number, quant_type in enumerate(stored):
            if number and quant_type == stored[number - 1]:  # neighbouring candidates may share a fallback type
                errors[:, number] = errors[:, number - 1]
            elif quant_type is not None:
                packed = pack_matrix(matrix, quant_type, columns, name=tensor.name, packing=packing)
                errors[:, number] = _squares(unpack_matrix(packed, quant_type, tensor.row_width) - matrix, weights)
        weighted, plain = _squares(matrix, weights)
        return np.array([*errors[0], weighted, *errors[1], plain])

    return ordered_parallel(measure, tensor.n_experts, threads)


def _squares(matrix: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Sum of squares, weighed by column and plain."""
    by_column = np.einsum("ij,ij->j", matrix, matrix, dtype=np.float64)
    return float(by_column @ weights), float(by_column.sum())


def _text_only(values: np.ndarray) -> np.ndarray:
    """Values (..., T) as (A = 1, M, ..., T), under text alone; zero under the other modalities."""
    spread = np.where(np.isnan(values), np.nan, np.zeros((1, len(MODALITIES), *values.shape)))
    spread[0, TEXT] = values
    return spread
