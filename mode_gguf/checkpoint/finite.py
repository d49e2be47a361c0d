"""Weights that are NaN or infinite, found where they are read."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mode_gguf.errors import InputError

_EXPONENT: Final[Mapping[str, tuple[np.dtype[Any], int]]] = {
    "uint16": (np.dtype("<u2"), 0x7F80),
    "float16": (np.dtype("<u2"), 0x7C00),
    "float32": (np.dtype("<u4"), 0x7F800000),
}
"""Bits of the exponent, by NumPy's type; uint16 is taken for the bits of bfloat16."""
_CHUNK: Final = 2**17
"""Values that a processor's cache holds: looked at there, they cost less than their copy from the file."""
_EXPERT: Final = re.compile(r"\.experts\.(\d+)\.")


def first_not_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Place of the first NaN or infinity in a C-contiguous array of weights; None where all are finite."""
    dtype, mask = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(dtype)
    exponent = dtype.type(mask)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK] & exponent
        if chunk.max() == exponent:
            place = start + int(np.argmax(chunk == exponent))
            return tuple(int(axis) for axis in np.unravel_index(place, array.shape))
    return None


def check_finite(
    array: np.ndarray,
    file: Path,
    name: str,
    shape: Sequence[int] | None = None,
    index: Sequence[int | slice | np.ndarray] = (),
) -> np.ndarray:
    """`array`, which was read as `tensor[index]`, when all of it is finite.

    Args:
        array: float32, float16, or the bits of bfloat16 in uint16; C-contiguous.
        file: it was read from.
        name: of the tensor.
        shape: of the whole tensor, by default the array's.
        index: the part of it that was read, at most one of its dimensions by an array.

    Raises:
        InputError: naming the first place with another value: expert, row and column in the tensor as it is stored.
    """
    found = first_not_finite(array)
    if found is not None:
        whole = array.shape if shape is None else tuple(shape)
        value = _value(array, found)
        raise InputError(
            f"{file}: tensor {name} is {value} at {_place(name, whole, found, index)}; weights must be finite: "
            "download the checkpoint again, or use one from before training went wrong"
        )
    return array


def _value(array: np.ndarray, place: tuple[int, ...]) -> str:
    if array.dtype == np.uint16:
        bits = int(array[place])
        return "NaN" if bits & 0x7F else "-infinite" if bits & 0x8000 else "infinite"
    value = float(array[place])
    return "NaN" if np.isnan(value) else "-infinite" if value < 0 else "infinite"


def _place(name: str, shape: Sequence[int], found: Sequence[int], index: Sequence[int | slice | np.ndarray]) -> str:
    """The place in the whole tensor, in words."""
    left, place = list(found), []
    for axis, size in enumerate(shape):
        chosen = np.arange(size)[index[axis]] if axis < len(index) else np.arange(size)
        place.append(int(chosen if chosen.ndim == 0 else chosen[left.pop(0)]))
    in_words = []
    alone = _EXPERT.search(name)
    if alone:
        in_words.append(f"expert {alone[1]}")
    elif len(place) == 3 and "exp" in name:
        in_words.append(f"expert {place.pop(0)}")
    if len(place) == 2:
        in_words += [f"row {place[0]}", f"column {place[1]}"]
    else:
        in_words.append(str(place))
    return ", ".join(in_words)
