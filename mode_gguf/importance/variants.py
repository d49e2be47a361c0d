"""Variants of a model, which differ in the types of some matrices, and their changes of weights."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.errors import UsageError
from mode_gguf.forward.modality import MODALITIES
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.weight_errors import change_of_weights
from mode_gguf.options import Packing
from mode_gguf.quantization.ordered_parallel import ordered_parallel
from mode_gguf.quantization.types import QuantType

TypesByTensor: TypeAlias = Mapping[str, tuple[QuantType, ...]]
"""Types of tensors by name: one per expert of an expert tensor, one for any other."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that differs from a base.

    Attributes:
        name: for messages.
        types: of the tensors that differ; tensors that are not named are as in the base.
        modality: only tokens of this modality pass through the weights that differ; None: all tokens do.
    """

    name: str
    types: TypesByTensor
    modality: int | None = None


@dataclass(frozen=True, slots=True)
class TypeChanges:
    """Changes of some tensors' weights, float32 (rows, n_in) each.

    Attributes:
        base: by tensor and expert, the base's weights less the full-precision ones.
        variants: by tensor, expert and name of the type, weights in that type less the base's; nothing where the two
            have the same type.
    """

    base: Mapping[tuple[str, int], Tensor]
    variants: Mapping[tuple[str, int, str], Tensor]

    def affects(self, variant: Variant) -> bool:
        """Whether the variant's weights differ from the base's in one of these tensors."""
        return any(self.of(variant, name, expert) is not None for name, expert in _matrices(variant.types))

    def of(self, variant: Variant, name: str, expert: int = 0) -> Tensor | None:
        """The variant's weights less the base's; None where they are the same."""
        if name not in variant.types:
            return None
        return self.variants.get((name, expert, variant.types[name][expert].name))


def type_changes(
    tensors: Sequence[SourceTensor],
    base: TypesByTensor,
    variants: Sequence[Variant],
    importance: Importance,
    packing: Packing,
    device: torch.device,
) -> TypeChanges:
    """Pack `tensors`, on all cores, to the types that the base and the variants have them in; every matrix once."""
    by_name = {tensor.name: tensor for tensor in tensors}
    in_base = {(name, e): t for name, types in base.items() if name in by_name for e, t in enumerate(types)}
    in_variants = {
        (name, e, t)
        for variant in variants
        for name, types in variant.types.items()
        if name in by_name
        for e, t in enumerate(types)
        if in_base.get((name, e)) != t
    }
    wanted = [(name, e, t) for (name, e), t in in_base.items()]
    wanted += sorted(in_variants, key=lambda key: (key[0], key[1], key[2].name))

    def pack(number: int) -> Tensor:
        name, expert, quant_type = wanted[number]
        return change_of_weights(by_name[name], expert, quant_type, importance, packing, device)

    packed = list(ordered_parallel(pack, len(wanted), os.cpu_count() or 1))
    of_base = dict(zip(in_base, packed[: len(in_base)], strict=True))
    of_variants = {}
    for (name, expert, quant_type), change in zip(wanted[len(in_base) :], packed[len(in_base) :], strict=True):
        from_base = of_base.get((name, expert))
        of_variants[name, expert, quant_type.name] = change if from_base is None else change - from_base
    return TypeChanges(of_base, of_variants)


def check_types(tensors: Sequence[SourceTensor], base: TypesByTensor, variants: Sequence[Variant]) -> None:
    """Check that types are given for tensors of the model, one per expert; raises UsageError."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for model, types in [("the base", base), *((variant.name, variant.types) for variant in variants)]:
        for name, given in types.items():
            if name not in by_name:
                raise UsageError(f"{model}: types are given for {name}, which this model does not have")
            n_experts = by_name[name].n_experts
            if len(given) != n_experts:
                raise UsageError(f"{model}: {len(given)} types are given for {name}, {n_experts} expected")
    for variant in variants:
        if variant.modality is not None and variant.modality not in range(len(MODALITIES)):
            raise UsageError(f"{variant.name}: modality {variant.modality}, 0 to {len(MODALITIES) - 1} expected")


def _matrices(types: TypesByTensor) -> list[tuple[str, int]]:
    return [(name, expert) for name, by_expert in types.items() for expert in range(len(by_expert))]
