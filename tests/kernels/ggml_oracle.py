"""libggml itself, by ctypes from the shared object that xllamacpp ships: the oracle for packed bytes."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType


@cache
def library() -> ctypes.CDLL:
    """The loaded library with the signatures of the functions used here."""
    ggml = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, size]
    return ggml


def row_bytes(type_name: str, n: int) -> int:
    """Bytes of a row of n weights."""
    return int(library().ggml_row_size(GGMLQuantizationType[type_name], n))


def quantize(
    matrix: np.ndarray, type_name: str, importance: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """`ggml_quantize_chunk` of a contiguous float32 (rows, n) matrix: uint8 (rows, row_bytes)."""
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    rows, n = matrix.shape
    if out is None:
        out = np.zeros((rows, row_bytes(type_name, n)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(
        GGMLQuantizationType[type_name], matrix.ctypes.data, out.ctypes.data, 0, rows, n, weights
    )
    assert written == out.nbytes
    return out


def dequantize(packed: np.ndarray, type_name: str, n: int) -> np.ndarray:
    """`dequantize_row_*` of uint8 (rows, row_bytes): float32 (rows, n)."""
    weights = np.empty((packed.shape[0], n), np.float32)
    function = getattr(library(), f"dequantize_row_{type_name.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(np.ascontiguousarray(packed).ctypes.data, weights.ctypes.data, weights.size)
    return weights
