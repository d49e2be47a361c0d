"""Experts of a layer that have different types: stored in groups of one type each (docs/design/per-expert-layout.md).

A tensor of experts becomes one tensor per group, of which the first keeps the name, and every layer gets a map from its
experts to their places. Everything that packs and writes works on the tensors as they are stored; a plan speaks of
experts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeAlias

import numpy as np

from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, SourceTensor
from mode_gguf.errors import InputError
from mode_gguf.quantization.types import INDEX, QuantType

VERSION: Final = 1
VERSION_KEY: Final = "expert_groups.version"
ARCHITECTURE_SUFFIX: Final = "+expert_groups"
"""Suffix of general.architecture: a llama.cpp that does not know groups refuses the file and names this."""

ExpertTypes: TypeAlias = Mapping[str, Sequence[QuantType]]
"""Type of every expert, in order, by name of the whole tensor; all expert tensors of a layer, or none."""

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Group:
    """Experts of one layer whose tensors have the same types.

    Attributes:
        experts: their numbers, ascending.
        types: by name of the whole tensor.
    """

    experts: tuple[int, ...]
    types: Mapping[str, QuantType]


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of a file.

    Attributes:
        tensors: in file order; groups and maps in place of the tensors they make up.
        members: of a group's tensor, by its name: the name of the whole tensor and the numbers of its experts.
    """

    tensors: tuple[SourceTensor, ...]
    members: Mapping[str, tuple[str, tuple[int, ...]]]

    def experts_of(self, tensor: SourceTensor) -> Sequence[int]:
        """Numbers of the experts that an expert tensor holds, in its order."""
        return self.members[tensor.name][1] if tensor.name in self.members else range(tensor.n_experts)

    def rows_of(self, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """A stored tensor's rows of arrays (E, ...) by name of the whole tensor, such as importance; None without."""
        whole, experts = self.members.get(name, (name, None))
        if whole not in arrays:
            return None
        return arrays[whole] if experts is None else arrays[whole][list(experts)]


def layer_groups(experts: ExpertTypes) -> dict[int, tuple[Group, ...]]:
    """Groups of the layers whose experts differ, in order of their first experts; other layers are left out."""
    layers: dict[int, dict[str, Sequence[QuantType]]] = {}
    for name, types in experts.items():
        layers.setdefault(_layer_of(name), {})[name] = types
    groups = {}
    for layer, tensors in layers.items():
        if len({len(types) for types in tensors.values()}) > 1:
            lengths = ", ".join(f"{name} {len(types)}" for name, types in tensors.items())
            raise InputError(f"the plan's numbers of experts in layer {layer} differ: {lengths}; make a new plan")
        members: dict[tuple[QuantType, ...], list[int]] = {}
        for expert, types in enumerate(zip(*tensors.values(), strict=True)):
            members.setdefault(types, []).append(expert)
        if len(members) > 1:
            groups[layer] = tuple(
                Group(tuple(numbers), dict(zip(tensors, types, strict=True))) for types, numbers in members.items()
            )
    return groups


def stored_types(types: Mapping[str, QuantType], experts: ExpertTypes) -> dict[str, QuantType]:
    """Types by name of the stored tensors, from those of whole tensors and those of experts.

    Raises:
        InputError: expert tensors of a layer have different numbers of experts.
    """
    stored = {**types, **{name: of_experts[0] for name, of_experts in experts.items()}}
    for layer, groups in layer_groups(experts).items():
        stored[map_name(layer)] = INDEX
        for number, group in enumerate(groups):
            stored |= {group_name(name, number): quant_type for name, quant_type in group.types.items()}
    return stored


def stored_tensors(tensors: Sequence[SourceTensor], experts: ExpertTypes) -> StoredTensors:
    """The tensors of the file, from those of the model.

    Raises:
        InputError: a tensor of experts is unknown, has another number of experts, or is the only one of its layer
            without types of its experts.
    """
    groups = layer_groups(experts)
    _check(tensors, experts, groups)
    stored: list[SourceTensor] = []
    members: dict[str, tuple[str, tuple[int, ...]]] = {}
    mapped: set[int] = set()
    for tensor in tensors:
        layer = tensor.layer
        if tensor.role is not Role.EXPERT or layer is None or layer not in groups:
            stored.append(tensor)
            continue
        if layer not in mapped:
            mapped.add(layer)
            stored.append(_map_tensor(layer, groups[layer], tensor.n_experts))
        for number, group in enumerate(groups[layer]):
            part = replace(
                tensor,
                name=group_name(tensor.name, number),
                shape=(len(group.experts), *tensor.shape[1:]),
                read=partial(_read_member, tensor, group.experts),
            )
            stored.append(part)
            members[part.name] = (tensor.name, group.experts)
    return StoredTensors(tuple(stored), members)


def map_bytes(tensors: Sequence[SourceTensor], types_offered: int) -> int:
    """Bytes that the maps of all layers take at most, when experts may have one of `types_offered` types."""
    experts = {tensor.layer: tensor.n_experts for tensor in tensors if tensor.role is Role.EXPERT}
    return sum(INDEX.type_size * count * min(types_offered, count) for count in experts.values())


def group_name(name: str, number: int) -> str:
    """`blk.0.ffn_up_exps.weight`, `blk.0.ffn_up_exps.1.weight`, ...: the first group keeps the name."""
    return name if number == 0 else f"{name.removesuffix('weight')}{number}.weight"


def map_name(layer: int) -> str:
    """The name of the tensor that maps a layer's experts to their places."""
    return f"blk.{layer}.ffn_exps_map.weight"


def _layer_of(name: str) -> int:
    found = _LAYER.match(name)
    if found is None:
        raise InputError(f"the plan has types of experts for {name}, which is in no layer; make a new plan")
    return int(found[1])


def _check(tensors: Sequence[SourceTensor], experts: ExpertTypes, groups: Mapping[int, tuple[Group, ...]]) -> None:
    known = {tensor.name: tensor.n_experts for tensor in tensors if tensor.role is Role.EXPERT}
    for name, types in experts.items():
        if name not in known:
            raise InputError(
                f"the plan has types of experts for {name}, which the model does not have; make a new plan"
            )
        if len(types) != known[name]:
            raise InputError(
                f"the plan has types of {len(types)} experts for {name}, the model has {known[name]}; make a new plan"
            )
    for tensor in tensors:
        if tensor.role is Role.EXPERT and tensor.layer in groups and tensor.name not in experts:
            raise InputError(
                f"the plan gives {tensor.name} one type, and other tensors of its layer a type per expert; "
                "give it `experts`, too"
            )


def _map_tensor(layer: int, groups: Sequence[Group], n_experts: int) -> SourceTensor:
    """Numbers within their groups, int32 (groups, E); -1 for experts of other groups."""
    places = np.full((len(groups), n_experts), -1, np.int32)
    for row, group in zip(places, groups, strict=True):
        row[list(group.experts)] = np.arange(len(group.experts))
    return SourceTensor(
        map_name(layer), places.shape, Role.INDEX, (), lambda _, rows=ALL_ROWS: places[rows], layer=layer
    )


def _read_member(tensor: SourceTensor, experts: Sequence[int], index: int, rows: slice = ALL_ROWS) -> Array:
    return tensor.read(experts[index], rows)
