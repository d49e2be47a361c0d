"""One GGUF model in several files, as llama.cpp's llama-gguf-split makes them and llama.cpp loads them.

Users give the first file; llama.cpp finds the others by name. All metadata are in the first; each says which one it is.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mode_gguf.errors import UsageError

NUMBER_KEY: Final = "split.no"
"""uint16, from 0."""
COUNT_KEY: Final = "split.count"
"""uint16, the number of files."""
TENSORS_KEY: Final = "split.tensors.count"
"""int32, the number of tensors in all files together."""
MAX_SHARDS: Final = 2**16 - 1
_ALIGNMENT: Final = 32
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def assign_to_shards(tensor_bytes: Sequence[int], limit: int) -> list[range]:
    """Indices of the tensors of each shard, from their bytes: in order, as many as fit into `limit`.

    Like llama-gguf-split's, the limit is on the tensors with their padding; the first file has the metadata besides.
    A tensor is never split: one that is larger than the limit has a shard of its own.

    Raises:
        UsageError: there would be too many shards.
    """
    shards: list[range] = []
    start, filled = 0, 0
    for index, n_bytes in enumerate(tensor_bytes):
        padded = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        if filled and filled + padded > limit:
            shards.append(range(start, index))
            start, filled = index, 0
        filled += padded
    shards.append(range(start, len(tensor_bytes)))
    if len(shards) > MAX_SHARDS:
        raise UsageError(
            f"--shard-size of {limit:,} bytes makes {len(shards)} files, llama.cpp loads {MAX_SHARDS} at most; "
            "give a larger size"
        )
    return shards


def shard_paths(path: Path, count: int) -> list[Path]:
    """`model-00001-of-00003.gguf` and so on for `model.gguf`; just `path` where one file is enough."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def sibling_shards(first: Path, count: int) -> list[Path] | None:
    """Paths of the `count` shards of the model whose first one is `first`; None where its name is another shard's."""
    match = _NAME.fullmatch(first.name)
    if match is None or (int(match["number"]), int(match["count"])) != (1, count):
        return None
    return shard_paths(first.with_name(f"{match['stem']}.gguf"), count)


def earlier_shards(path: Path) -> list[Path]:
    """Shards of the model `path` that are there, in whatever number an earlier run made them; first ones first."""
    if not path.parent.is_dir():
        return []
    found = [
        (int(match["number"]), file)
        for file in path.parent.iterdir()
        if (match := _NAME.fullmatch(file.name)) and match["stem"] == path.stem
    ]
    return [file for _, file in sorted(found)]


def is_later_shard(path: Path) -> bool:
    """Whether the name says that this is a shard, and not the first, which users open."""
    match = _NAME.fullmatch(path.name)
    return match is not None and int(match["number"]) > 1
