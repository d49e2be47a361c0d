"""The types our kernels do not pack, packed and unpacked by libggml itself through its C API.

libggml ends the process where an assertion fails, and it asserts what float32 arithmetic gave. `check_importance` and
`LARGEST_WEIGHT` keep all of it finite: sums of importance, squared weight and squared level (at most 15) over 32
columns, and importance^0.5 times weight^2.5 in the search for the nearest grid point.
"""

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.llama_cpp_library import ENVIRONMENT_VARIABLE, SUBFOLDERS, embedded_library, named_folder
from mode_gguf.quantization.types import Packer, QuantType, types_packed_by

LARGEST_WEIGHT: Final = 1e9
"""Largest magnitude handed to libggml; float16 block scales end earlier, which `scale_overflows` finds afterwards."""

_LARGEST_PRODUCT: Final = 1e34  # of importance, weight, and weight again where that is above 1
_FILE_NAMES: Final = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
_LIBRARY_FOLDERS: Final = (*SUBFOLDERS, "lib", "../lib")
_WAY_OUT: Final = (
    f"install the package with: pip install xllamacpp, or let {ENVIRONMENT_VARIABLE} name the folder that llama.cpp "
    "was built into with shared libraries"
)
_TYPES: Final = types_packed_by(Packer.LIBGGML)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_type_size": (c_size_t, (c_int,)),
    "ggml_quantize_requires_imatrix": (c_bool, (c_int,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
}


def library_path() -> Path:
    """The shared object that packs: the one in `xllamacpp`, else libggml-base in or near MODE_GGUF_LLAMA_CPP's folder.

    Raises:
        MissingResourceError: there is neither.
    """
    # The embedded one comes first. The tests run with it, it is a release build (debug builds assert more), and a plan
    # gives the same bytes whatever tools the environment variable names, which other compiler flags might change.
    path = embedded_library() or next(_libraries_of_the_user(), None)
    if path is None:
        raise MissingResourceError(f"{', '.join(_TYPES)} are packed by libggml, which was not found; {_WAY_OUT}")
    return path


def load_library(path: Path, functions: Mapping[str, tuple[Any, tuple[Any, ...]]], way_out: str) -> ctypes.CDLL:
    """The shared object at `path`, ggml's or one that contains it, with its functions declared.

    Args:
        functions: ctypes result and argument types by name.
        way_out: what the user can do about an error.

    Raises:
        MissingResourceError: it cannot be loaded, or lacks one of the functions.
    """
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingResourceError(f"{path} cannot be loaded ({error}); {way_out}") from error
    for name, (result, arguments) in functions.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise MissingResourceError(f"{path} does not export {name}; {way_out}") from None
        function.restype = result
        function.argtypes = arguments
    return loaded


@cache
def library() -> ctypes.CDLL:
    """libggml, loaded once, declared, and checked to know our types by the same numbers and sizes.

    Raises:
        MissingResourceError: there is none, or it is another one than expected.
    """
    path = library_path()
    unpackers = {_unpacker(quant_type): (None, (c_void_p, c_void_p, c_int64)) for quant_type in _TYPES.values()}
    lib = load_library(path, _FUNCTIONS | unpackers, _WAY_OUT)
    for quant_type in _TYPES.values():
        number = quant_type.ggml_type.value
        found = (lib.ggml_type_name(number), lib.ggml_blck_size(number), lib.ggml_type_size(number))
        if found != (quant_type.name.lower().encode(), quant_type.block_size, quant_type.type_size):
            raise MissingResourceError(
                f"{path}: type {number} is {found}, {quant_type.name} with {quant_type.block_size} weights in "
                f"{quant_type.type_size} bytes expected; {_WAY_OUT}"
            )
    return lib


def status() -> str:
    """The path of the libggml in use, or in words why none can be."""
    try:
        library()
    except MissingResourceError as error:
        return str(error)
    return str(library_path())


def check_available(types: Iterable[QuantType]) -> None:
    """Make sure that libggml is there if one of `types` needs it.

    Raises:
        MissingResourceError: it is needed and cannot be used.
    """
    if any(quant_type.packer is Packer.LIBGGML for quant_type in types):
        library()


def needs_importance(quant_type: QuantType) -> bool:
    """Whether `quant_type` cannot be packed without an importance matrix; libggml knows (IQ2_XXS and IQ2_XS).

    Raises:
        MissingResourceError: the type is libggml's, which cannot be used.
    """
    if quant_type.packer is not Packer.LIBGGML:
        return False
    return bool(library().ggml_quantize_requires_imatrix(quant_type.ggml_type.value))


def is_storable(tensor: SourceTensor, quant_type: QuantType) -> bool:
    """Whether blocks of the type fit the tensor's rows, and calibration gives the importance that the type may need.

    Raises:
        MissingResourceError: like `needs_importance`.
    """
    if not quant_type.fits(tensor.row_width):
        return False
    return tensor.activation is not None or not needs_importance(quant_type)


def check_importance(
    importance: np.ndarray | None, n: int, quant_type: QuantType, *, largest_weight: float, name: str
) -> None:
    """Make sure that libggml can work with an importance.

    Args:
        importance: float32 (n,), finite and not negative; None where the type needs none.
        largest_weight: magnitude, at most `LARGEST_WEIGHT`.
        name: what to call the matrix in errors.

    Raises:
        InputError: it is missing, misshapen, not finite, negative, or so large that libggml's sums would overflow.
    """
    if importance is None:
        if needs_importance(quant_type):
            raise InputError(
                f"{name}: {quant_type.name} needs an importance matrix, and there is none for this tensor; run "
                "`mode-gguf calibrate` in this work folder first, or choose another type for it"
            )
        return
    if importance.dtype != np.float32 or importance.shape != (n,):
        raise InputError(
            f"{name}: importance is {importance.dtype} {importance.shape}, float32 ({n},) expected; use an importance "
            "matrix of this model"
        )
    usable = np.isfinite(importance) & (importance >= 0)
    if not usable.all():
        column = int(np.argmin(usable))
        raise InputError(
            f"{name}: importance of column {column}: {importance[column]} found, a finite value of at least 0 expected"
        )
    largest = float(importance.max(initial=0))
    if largest * largest_weight * max(largest_weight, 1.0) > _LARGEST_PRODUCT:
        raise InputError(
            f"{name}: importance up to {largest:g} with weights up to {largest_weight:g} overflows when packed to "
            f"{quant_type.name}; scale the importance matrix down"
        )


def quantize(values: np.ndarray, quant_type: QuantType, importance: np.ndarray | None, out: np.ndarray) -> None:
    """`ggml_quantize_chunk`, in the calling thread and without the GIL.

    Args:
        values: float32 (rows, n), contiguous, magnitudes of at most `LARGEST_WEIGHT`.
        quant_type: one that libggml packs; whole blocks in n.
        importance: as checked by `check_importance`.
        out: uint8 (rows, row_bytes), contiguous, to write to.
    """
    rows, n = values.shape
    weights = None if importance is None else np.ascontiguousarray(importance)
    library().ggml_quantize_chunk(
        quant_type.ggml_type.value,
        values.ctypes.data,
        out.ctypes.data,
        0,
        rows,
        n,
        None if weights is None else weights.ctypes.data,
    )


def scale_overflows(packed: np.ndarray, quant_type: QuantType) -> np.ndarray:
    """bool (rows, blocks): whose float16 scale is not finite."""
    return np.asarray(~np.isfinite(_scales(packed, quant_type)))


def restore_scale(packed: np.ndarray, values: np.ndarray, quant_type: QuantType, importance: np.ndarray | None) -> None:
    """Scale every row of `packed` so that outputs keep their size, as refined packing by our kernels does.

    A least squares fit q of a row x has <q, x> < <x, x> (weighted with the importance): all outputs shrink together.
    All weights of these types are proportional to their block's scale, so multiplying the scales by <x, x> / <q, x>
    undoes it. Rows that are stored so badly that this is not within 1/2 to 2 stay as they are.

    Args:
        packed: uint8 (rows, row_bytes), changed in place; all scales finite.
        values: float32 (rows, n) that were packed; importance: float32 (n,) that they were packed with.
    """
    n = values.shape[1]
    weighted = values.astype(np.float64) * (1.0 if importance is None else importance)
    wanted = np.sum(weighted * values, axis=1)
    found = np.sum(weighted * dequantize(packed, quant_type, n), axis=1)
    usable = (found > 0) & (wanted <= 2 * found) & (found <= 2 * wanted)
    gain = np.where(usable, wanted / np.where(usable, found, 1), 1)
    largest = float(np.finfo(np.float16).max)
    scales = np.clip(_scales(packed, quant_type) * gain[:, None], -largest, largest).astype(np.float16)
    blocks = packed.reshape(packed.shape[0], -1, quant_type.type_size)
    blocks[..., :2] = scales[..., None].view(np.uint8)


def _scales(packed: np.ndarray, quant_type: QuantType) -> np.ndarray:
    """float16 (rows, blocks): the scales, the first field of all these types' blocks."""
    blocks = packed.reshape(packed.shape[0], -1, quant_type.type_size)
    scales: np.ndarray = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    return scales


def dequantize(packed: np.ndarray, quant_type: QuantType, n: int) -> np.ndarray:
    """`dequantize_row_*` of contiguous uint8 (rows, row_bytes): float32 (rows, n)."""
    weights = np.empty((packed.shape[0], n), np.float32)
    getattr(library(), _unpacker(quant_type))(packed.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def _unpacker(quant_type: QuantType) -> str:
    return f"dequantize_row_{quant_type.name.lower()}"


def _libraries_of_the_user() -> Iterator[Path]:
    folder = named_folder()
    if folder:
        paths = (folder / place / name for place in _LIBRARY_FOLDERS for name in _FILE_NAMES)
        yield from (path for path in paths if path.is_file())
