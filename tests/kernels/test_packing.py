"""Packing and unpacking: shapes, dtypes, and refused arguments; `test_fuzz` has the hard weights."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf_kernels import TYPES, NonFiniteError, PackingError, pack, unpack
from mode_gguf_kernels.simd import LANES
from tests.kernels import ggml_oracle

F = np.float32
ROWS, COLUMNS = 37, 512  # 74 super-blocks: two full tiles and a part of one
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "IQ4_NL": (0,),
}
"""First bytes of a block's float16 numbers."""


def normal(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(F)


def bfloat16_bits(matrix: np.ndarray) -> np.ndarray:
    return (matrix.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("type_name", TYPES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 7),
    exponent=st.floats(-9, 5),
    spread=st.floats(0, 4),
    tail=st.sampled_from((0.0, 1.5, 5.0)),
    kept_importance=st.sampled_from((None, 1.0, 0.8, 0.1)),
)
def test_drawn_matrices_pack_to_the_bytes_of_libggml(
    type_name: str,
    seed: int,
    rows: int,
    blocks: int,
    exponent: float,
    spread: float,
    tail: float,
    kept_importance: float | None,
) -> None:
    generator = np.random.default_rng(seed)
    columns = max(TYPES[type_name].block_size, 256 // 2 ** (seed % 4)) * blocks  # 32 to 256 where they fit
    shape = rows, columns
    drawn = generator.standard_t(tail, shape) if tail else generator.standard_normal(shape)
    matrix = (drawn * 10.0**exponent).astype(F)
    importance = None
    if kept_importance is not None:
        kept = generator.random(columns) < kept_importance
        importance = (np.exp(spread * generator.standard_normal(columns)) * kept).astype(F)
    expected = ggml_oracle.quantize(matrix, type_name, importance)
    np.testing.assert_array_equal(pack(matrix, type_name, importance), expected)


@pytest.mark.parametrize("type_name", TYPES)
def test_half_precision_matrices_pack_like_the_floats_they_stand_for(type_name: str) -> None:
    importance = normal(5, 1, COLUMNS)[0] ** 2
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every_half = np.where(np.isfinite(halves), halves, np.float16(0)).reshape(-1, COLUMNS)
    for half in (every_half, normal(3).astype(np.float16)):
        expected = pack(half.astype(F), type_name, importance)
        np.testing.assert_array_equal(pack(half, type_name, importance), expected)
    bits = bfloat16_bits(normal(4))
    widened = (bits.astype(np.uint32) << 16).view(F)
    expected = pack(widened, type_name, importance)
    np.testing.assert_array_equal(pack(bits, type_name, importance), expected)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("rows", [1, LANES - 1, LANES, LANES + 1])
def test_rows_need_not_fill_the_lanes(type_name: str, rows: int) -> None:
    matrix = normal(rows, rows, 256)
    packed = pack(matrix, type_name)
    np.testing.assert_array_equal(packed, ggml_oracle.quantize(matrix, type_name))
    np.testing.assert_array_equal(unpack(packed, type_name, 256), ggml_oracle.dequantize(packed, type_name, 256))


@pytest.mark.parametrize("type_name", TYPES)
def test_any_packed_bytes_unpack_to_the_bits_of_libggml_and_gguf(type_name: str) -> None:
    kernels = TYPES[type_name]
    generator = np.random.default_rng(11)
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // kernels.block_size, kernels.block_bytes), np.uint8)
    for start in HALVES[type_name]:
        halves = generator.standard_normal((len(blocks), 1)).astype(np.float16)
        halves[::5] *= np.float16(1e-7)  # subnormal
        blocks[:, start : start + 2] = halves.view(np.uint8)
    packed = blocks.reshape(ROWS, -1)
    bits = unpack(packed, type_name, COLUMNS).view(np.uint32)
    np.testing.assert_array_equal(bits, ggml_oracle.dequantize(packed, type_name, COLUMNS).view(np.uint32))
    by_gguf = gguf_dequantize(packed, gguf.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(bits, by_gguf.view(np.uint32))


@pytest.mark.parametrize("type_name", TYPES)
def test_types_have_the_blocks_of_ggml(type_name: str) -> None:
    kernels = TYPES[type_name]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert (kernels.block_size, kernels.block_bytes) == sizes
    assert ggml_oracle.row_bytes(type_name, 1024) == 1024 // kernels.block_size * kernels.block_bytes


def test_strided_and_read_only_matrices_are_taken() -> None:
    matrix = normal(6)
    expected = pack(matrix, "Q6_K")
    np.testing.assert_array_equal(pack(np.asfortranarray(matrix), "Q6_K"), expected)
    matrix.flags.writeable = False
    np.testing.assert_array_equal(pack(matrix, "Q6_K"), expected)


def test_packs_into_the_array_that_is_given() -> None:
    out = np.zeros((ROWS, COLUMNS // 256 * 210), np.uint8)
    assert pack(normal(6), "Q6_K", out=out) is out
    np.testing.assert_array_equal(out, pack(normal(6), "Q6_K"))


def test_no_rows_pack_to_no_bytes() -> None:
    assert pack(np.empty((0, 256), F), "Q4_K").shape == (0, 144)
    assert unpack(np.empty((0, 144), np.uint8), "Q4_K", 256).shape == (0, 256)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (36, 511), (33, 100)])
def test_a_value_that_is_not_finite_is_named(dtype: type, value: float, row: int, column: int) -> None:
    matrix = normal(8)
    matrix[row, column] = value
    stored = bfloat16_bits(matrix) if dtype is np.uint16 else matrix.astype(dtype)
    with pytest.raises(NonFiniteError, match=f"row {row}, column {column}: .*{abs(value)!s}") as caught:
        pack(stored, "Q8_0")
    assert (caught.value.row, caught.value.column) == (row, column)


IMPORTANCE = np.ones(COLUMNS, F)


@pytest.mark.parametrize(
    ("matrix", "type_name", "importance", "message"),
    [
        (normal(1)[:, :300], "Q4_K", None, "rows of 300 weights do not fit Q4_K: a multiple of 256"),
        (normal(1).astype(np.float64), "Q4_K", None, "float64 cannot be packed: float32, float16 or uint16"),
        (normal(1)[0], "Q4_K", None, r"shape \(512,\) cannot be packed"),
        (normal(1), "IQ4_XS", None, "no kernels for type 'IQ4_XS': choose from Q2_K, Q3_K"),
        (normal(1), "Q4_K", IMPORTANCE[:-1], r"importance is float32 \(511,\): float32 \(512,\) expected"),
        (normal(1), "Q4_K", IMPORTANCE.astype(np.float64), "importance is float64"),
        (normal(1), "Q4_K", -IMPORTANCE, "importance of column 0: -1.0 found"),
        (normal(1), "Q4_K", np.where(np.arange(COLUMNS) == 9, F(np.nan), IMPORTANCE), "importance of column 9: nan"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    matrix: np.ndarray, type_name: str, importance: np.ndarray | None, message: str
) -> None:
    with pytest.raises(PackingError, match=message):
        pack(matrix, type_name, importance)


@pytest.mark.parametrize(
    "out", [np.empty((ROWS, 287), np.uint8), np.empty((ROWS, 288), np.int8), np.empty((288, ROWS), np.uint8).T]
)
def test_an_output_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(PackingError, match=r"contiguous uint8 \(37, 288\) expected"):
        pack(normal(1), "Q4_K", out=out)


@pytest.mark.parametrize("packed", [np.zeros((2, 143), np.uint8), np.zeros((2, 144), np.int8), np.zeros(144, np.uint8)])
def test_bytes_that_are_not_of_the_type_are_refused(packed: np.ndarray) -> None:
    with pytest.raises(PackingError, match=r"cannot be unpacked as Q4_K: uint8 \(rows, 144\) expected"):
        unpack(packed, "Q4_K", 256)
