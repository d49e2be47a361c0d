"""GGUF files whose experts are stored in groups, made out of ordinary ones with gguf-py."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize
from gguf.gguf_reader import ReaderTensor

SUFFIX = "+expert_groups"
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")

Groups = Mapping[int, np.ndarray]
"""Per layer, the group of each expert: int (experts,). Layers not named keep one tensor per projection."""


def random_groups(layers: Sequence[int], experts: int, groups: int, seed: int) -> Groups:
    """Every expert in a group by chance, and no group empty."""
    rng = np.random.default_rng(seed)
    return {layer: rng.permutation(np.arange(experts) % groups) for layer in layers}


def number_in_group(groups: np.ndarray) -> np.ndarray:
    """The map tensor of a layer: int32 (groups, experts), an expert's number within the group, -1 outside it."""
    member = groups[None, :] == np.arange(groups.max() + 1)[:, None]
    return np.where(member, member.cumsum(axis=1) - 1, -1).astype(np.int32)


def write_grouped(
    target: Path,
    sources: Sequence[Path],
    groups: Groups,
    *,
    version: int | None = 1,
    architecture_suffix: str = SUFFIX,
    change_map: Callable[[np.ndarray], np.ndarray] = lambda numbers: numbers,
    ungrouped: Sequence[str] = (),
) -> Path:
    """Write `target`, whose experts of group g are those of sources[g], packed as they are there.

    Args:
        sources: files of one model that differ in their experts' types; all else is taken from the first.
        version: the value of `expert_groups.version`; None writes no such key.
        change_map: applied to every map, to write files that must be refused.
        ungrouped: projections ("down") that keep one tensor, that of the first source, in every layer.
    """
    readers = [GGUFReader(source) for source in sources]
    writer = _writer(target, readers[0], architecture_suffix)
    if version is not None:
        writer.add_uint32("expert_groups.version", version)
    others = [{tensor.name: tensor for tensor in reader.tensors} for reader in readers]
    mapped: set[int] = set()
    for tensor in readers[0].tensors:
        match = EXPERTS.fullmatch(tensor.name)
        layer = int(match[1]) if match else -1
        if match is None or layer not in groups or match[2] in ungrouped:
            _add(writer, tensor.name, tensor)
            continue
        stem = tensor.name.removesuffix(".weight")
        for group in range(groups[layer].max() + 1):
            source = others[group][tensor.name]
            name = tensor.name if group == 0 else f"{stem}.{group}.weight"
            _add(writer, name, source, np.flatnonzero(groups[layer] == group))
        if layer not in mapped:
            mapped.add(layer)
            writer.add_tensor(f"blk.{layer}.ffn_exps_map.weight", change_map(number_in_group(groups[layer])))
    return _written(target, writer)


def write_dequantized(target: Path, sources: Sequence[Path], groups: Groups) -> Path:
    """Write the ordinary file, with experts in F32, that holds the very weights of `write_grouped`'s."""
    readers = [GGUFReader(source) for source in sources]
    writer = _writer(target, readers[0], "")
    others = [{tensor.name: tensor for tensor in reader.tensors} for reader in readers]
    for tensor in readers[0].tensors:
        match = EXPERTS.fullmatch(tensor.name)
        if match is None:
            _add(writer, tensor.name, tensor)
            continue
        values = [dequantize(named[tensor.name].data, named[tensor.name].tensor_type) for named in others]
        group = groups.get(int(match[1]), np.zeros(len(values[0]), np.int64))
        chosen = np.stack([values[g][expert] for expert, g in enumerate(group)])
        writer.add_tensor(tensor.name, chosen.astype(np.float32))
    return _written(target, writer)


def _writer(target: Path, reader: GGUFReader, architecture_suffix: str) -> GGUFWriter:
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture + architecture_suffix)
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element)
    return writer


def _add(writer: GGUFWriter, name: str, tensor: ReaderTensor, experts: np.ndarray | None = None) -> None:
    data = tensor.data if experts is None else np.ascontiguousarray(tensor.data[experts])
    plain = tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    writer.add_tensor(name, data, raw_dtype=None if plain else tensor.tensor_type)


def _written(target: Path, writer: GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
