"""Rounding of a checkpoint's weights to a base GGUF's types, as the converter that made it rounds."""

import numpy as np

from mode_gguf.architectures.tensors import Array, as_float32


def rounded(array: Array, type_name: str) -> np.ndarray:
    """float32 values of an array, bfloat16 as its bits, once rounded to F32, F16 or BF16."""
    if type_name == "BF16" and array.dtype == np.uint16:
        return as_float32(array)
    values = as_float32(array)
    if type_name == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if type_name == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
