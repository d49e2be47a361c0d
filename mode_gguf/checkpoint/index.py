"""The files of a checkpoint's weights, and which tensor is read from which of them.

What transformers loads decides: `model.safetensors` where it is there, else everything in the shards that the index
names. What contradicts that beside it is refused, since nobody can tell which of two models was meant.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

import numpy as np

from mode_gguf.checkpoint.header import read_header
from mode_gguf.checkpoint.side_files import read_json
from mode_gguf.checkpoint.stored_tensor import StoredTensor
from mode_gguf.errors import InputError

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_SHARD: Final = re.compile(r"model(?:\.safetensors)?-(\d+)-of-(\d+)\.safetensors")
_COMPARED_BYTES: Final = 2**12
_COMPARED_PLACES: Final = 4
"""Pieces of so many bytes that two copies of a tensor are compared in, the first and last ones among them."""

Tensors = Mapping[str, StoredTensor]


def weight_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name, in the order of its index where it has one.

    Raises:
        InputError: there are no weights in safetensors, files are missing or broken, or two say different things of
            one model.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    listed = _weight_map(index) if index.exists() else {}
    if SINGLE_FILE in listed.values():  # one of the shards
        return _sharded(folder, index, listed)
    if single.is_file():
        return _alone(folder, single, set(listed.values()))
    if listed:
        _report_unlisted(folder, set(listed.values()))
        return _sharded(folder, index, listed)
    return _unlisted(folder)


def weight_files(names: Iterable[str], listed: Iterable[str]) -> list[str]:
    """The files that `weight_tensors` reads, of those in a repository; empty where it has none.

    Args:
        names: of files of a repository.
        listed: those that its index names.
    """
    found, listed = list(names), set(listed)
    if SINGLE_FILE in found and SINGLE_FILE not in listed:
        return [SINGLE_FILE]
    if listed:
        return [name for name in found if name in listed]
    return next(iter(_complete_sets(found).values()), [])


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights of a whole model in some form, pickled ones included."""
    names = [path.name for path in folder.iterdir()]
    pickled = any(name.startswith("pytorch_model") for name in names)
    return pickled or any(name in (INDEX_FILE, SINGLE_FILE) or _SHARD.fullmatch(name) for name in names)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(one, str) for one in weight_map.values())
    ):
        raise InputError(f"{index}: expected an object weight_map of tensor names to files; download it again")
    return dict(weight_map)


def _alone(folder: Path, single: Path, listed: set[str]) -> dict[str, StoredTensor]:
    """The tensors of `model.safetensors`, unless shards beside it hold another model.

    Args:
        listed: shards that an index names; where all are gone, it says nothing.
    """
    tensors = dict(read_header(single))
    there = _shards(folder)
    shards = sorted({file for file in listed if _is_inside(folder, file)} | set(there))
    others: dict[str, StoredTensor] = {}
    for file in shards:
        others |= dict(read_header(folder / file))
    whole = (bool(listed) and listed <= set(shards)) or bool(_complete_sets(there))
    what = None
    if more := sorted(others.keys() - tensors.keys()):
        what = f"only {others[more[0]].file.name} has tensor {more[0]:.200}"
    elif whole and (more := sorted(tensors.keys() - others.keys())):
        what = f"only {SINGLE_FILE} has tensor {more[0]:.200}"
    elif differing := next((name for name in others if not _agree(tensors[name], others[name])), None):
        what = f"tensor {differing:.200} is another in {others[differing].file.name}"
    if what is not None:
        raise InputError(
            f"{folder}: {SINGLE_FILE} and shards ({shards[0]}{', ...' if len(shards) > 1 else ''}) hold different "
            f"models ({what}); transformers loads {SINGLE_FILE}: remove the shards with {INDEX_FILE}, or that file"
        )
    return tensors


def _sharded(folder: Path, index: Path, listed: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Everything in the shards that an index names, which may name too little or the wrong one of them."""
    shards = {file: dict(read_header(_shard_path(folder, index, file))) for file in dict.fromkeys(listed.values())}
    holders = _holders(shards)
    tensors: dict[str, StoredTensor] = {}
    for name, file in listed.items():
        if name not in holders:
            raise InputError(
                f"{index}: tensor {name:.200} should be in {file}, which does not hold it; download both again"
            )
        tensors[name] = shards[file][name] if file in holders[name] else shards[holders[name][0]][name]
    if more := [name for name in holders if name not in tensors]:
        log.warning(
            "%s names %d of the %d tensors in its shards; all are read, as transformers does (%s first)",
            index,
            len(listed),
            len(holders),
            more[0],
        )
    return tensors | {name: shards[holders[name][0]][name] for name in more}


def _unlisted(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of shards without an index, when all of them are there."""
    names = [path.name for path in folder.iterdir()]
    complete = _complete_sets(names)
    if len(complete) > 1:
        counts = " and of ".join(map(str, complete))
        raise InputError(
            f"{folder}: shards of {counts} files found and no {INDEX_FILE} that says which are the model; remove the "
            "others"
        )
    if complete:
        (shards,) = complete.values()
        read = {file: dict(read_header(folder / file)) for file in shards}
        return {name: read[files[0]][name] for name, files in _holders(read).items()}
    if shards := _shards(folder):
        last = _SHARD.fullmatch(shards[-1])
        assert last is not None
        raise InputError(
            f"{folder}: {len(shards)} of {int(last[2])} shards and no {INDEX_FILE} found; download the checkpoint again"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise InputError(
            f"{folder}: only pickled weights (.bin, .pt) found, which can run code when opened; expected "
            "safetensors: save the model again with transformers' save_pretrained"
        )
    raise InputError(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE} found; expected a complete checkpoint")


def _holders(shards: Mapping[str, Tensors]) -> dict[str, list[str]]:
    """The shards that hold each tensor, in the order of the shards.

    Raises:
        InputError: two hold different ones.
    """
    holders: dict[str, list[str]] = {}
    for file, tensors in shards.items():
        for name, tensor in tensors.items():
            before = holders.setdefault(name, [])
            if before and not _agree(tensor, shards[before[0]][name]):
                raise InputError(
                    f"{tensor.file}: tensor {name:.200} is another in {before[0]}; shards of two saves are mixed, "
                    "download the checkpoint again"
                )
            before.append(file)
    return holders


def _agree(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have type and shape in common, and bytes wherever these are compared."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    last = max(first.nbytes - _COMPARED_BYTES, 0)
    places = sorted({int(place) for place in np.linspace(0, last, _COMPARED_PLACES)})
    with first.file.open("rb") as one, second.file.open("rb") as other:
        for place in places:
            size = min(_COMPARED_BYTES, first.nbytes - place)
            one.seek(first.offset + place)
            other.seek(second.offset + place)
            if one.read(size) != other.read(size):
                return False
    return True


def _report_unlisted(folder: Path, listed: set[str]) -> None:
    """Warn of shards that an index does not name, as an older save leaves them."""
    if others := [name for name in _shards(folder) if name not in listed]:
        log.warning(
            "%s: %d shards that %s does not name are not read (%s first); remove them if they are of an older save",
            folder,
            len(others),
            INDEX_FILE,
            others[0],
        )


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))


def _complete_sets(names: Iterable[str]) -> dict[int, list[str]]:
    """Shards in order, by how many there are, where none is missing."""
    sets: dict[int, dict[int, str]] = defaultdict(dict)
    for name in names:
        if shard := _SHARD.fullmatch(name):
            sets[int(shard[2])][int(shard[1])] = name
    return {
        count: [numbered[number] for number in sorted(numbered)]
        for count, numbered in sorted(sets.items())
        if sorted(numbered) == list(range(1, count + 1))
    }


def _is_inside(folder: Path, file: str) -> bool:
    """Whether a shard that an index names is there, below the folder."""
    return not _leads_outside(file) and _is_file(folder / file)


def _leads_outside(file: str) -> bool:
    readings = (PurePosixPath(file), PureWindowsPath(file))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in readings)


def _shard_path(folder: Path, index: Path, file: str) -> Path:
    """The path of a shard, below the folder only: an index comes from the network and must not name others.

    Symbolic links are followed, wherever they lead: the hub's cache consists of them, and an index cannot make one.
    """
    if _leads_outside(file):
        raise InputError(f"{index}: shard {file!r} lies outside the checkpoint folder; refused")
    path = folder / file
    if not _is_file(path):
        raise InputError(f"{path}: shard listed in {INDEX_FILE} is missing; download the checkpoint again")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False
