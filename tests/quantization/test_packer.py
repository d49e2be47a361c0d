"""The packer: float types against libggml, experts in order whatever the threads, errors that name the culprit."""

import threading
from collections.abc import Callable

import gguf
import numpy as np
import pytest

import mode_gguf_kernels
from mode_gguf.architectures.tensors import ALL_ROWS, Reader, Role, SourceTensor, as_float32
from mode_gguf.errors import InputError
from mode_gguf.quantization.packer import n_chunks, pack_matrix, packed_chunks, unpack_matrix
from mode_gguf.quantization.types import QUANT_TYPES, Packer, types_packed_by
from tests.kernels import ggml_oracle

EXPERTS, ROWS, COLUMNS = 7, 40, 512
Q2_K = QUANT_TYPES["Q2_K"]


def normal(seed: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expert_tensor(matrix: Callable[[int], np.ndarray] = normal) -> SourceTensor:
    def read(index: int, rows: slice = ALL_ROWS) -> np.ndarray:
        return matrix(index)[rows]

    shape = (EXPERTS, ROWS, COLUMNS)
    return SourceTensor("blk.3.ffn_up_exps.weight", shape, Role.EXPERT, ("experts.up",), read)


def dense_tensor(matrix: np.ndarray, role: Role = Role.DENSE, read: Reader | None = None) -> SourceTensor:
    def read_rows(_: int, rows: slice = ALL_ROWS) -> np.ndarray:
        return matrix[rows]

    return SourceTensor("blk.0.attn_q.weight", matrix.shape, role, ("q.weight",), read or read_rows)


@pytest.mark.parametrize("name", sorted(QUANT_TYPES.keys() & mode_gguf_kernels.TYPES.keys()))
def test_the_kernels_pack_the_blocks_of_the_types_table(name: str) -> None:
    kernels = mode_gguf_kernels.TYPES[name]
    quant_type = QUANT_TYPES[name]
    assert (kernels.block_size, kernels.block_bytes) == (quant_type.block_size, quant_type.type_size)


def test_the_table_gives_the_kernels_what_they_can_pack() -> None:
    assert types_packed_by(Packer.KERNELS).keys() == mode_gguf_kernels.TYPES.keys()
    assert types_packed_by(Packer.NUMPY).keys() == {"F32", "F16", "BF16"}


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_packed_bytes_are_those_of_libggml_and_unpack_again(name: str) -> None:
    matrix = normal(1)
    importance = normal(2, (COLUMNS,)) ** 2
    packed = pack_matrix(matrix, QUANT_TYPES[name], importance, name="m")
    np.testing.assert_array_equal(packed, ggml_oracle.quantize(matrix, name, importance))
    weights = unpack_matrix(packed, QUANT_TYPES[name], COLUMNS)
    assert weights.dtype == np.float32
    assert weights.base is not packed
    np.testing.assert_array_equal(weights, gguf.dequantize(packed, QUANT_TYPES[name].ggml_type))


@pytest.mark.parametrize("name", ["IQ2_S", "IQ4_XS"])
def test_half_precision_sources_are_widened_before_libggml_packs_them(name: str) -> None:
    bfloat16 = (normal(4).view(np.uint32) >> 16).astype(np.uint16)
    half = np.asfortranarray(normal(4).astype(np.float16))
    for source in (bfloat16, half):
        values = np.ascontiguousarray(as_float32(source))
        packed = pack_matrix(source, QUANT_TYPES[name], None, name="m")
        np.testing.assert_array_equal(packed, ggml_oracle.quantize(values, name))


@pytest.mark.parametrize(("name", "limit"), [("F16", 65519.0), ("BF16", 3.389e38), ("F32", 3.4e38)])
def test_float_types_round_like_libggml(name: str, limit: float) -> None:
    generator = np.random.default_rng(3)
    bits = generator.integers(0, 1 << 32, (64, 4096), np.uint32)
    bits[:, ::4] &= 0xFFFF8000  # ties of bfloat16
    bits[:, 1::4] &= 0xFFFFF000  # ties of float16
    bits[:, 2::4] = (bits[:, 2::4] & 0x87FFFFFF) | 0x30000000  # the range of float16, subnormal too
    values = bits.view(np.float32)
    matrix = np.where(np.abs(values) <= limit, values, np.float32(0))
    packed = pack_matrix(matrix, QUANT_TYPES[name], None, name="m")
    np.testing.assert_array_equal(packed, ggml_oracle.quantize(matrix, name))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_half_precision_sources_survive_the_float_type_they_have(name: str) -> None:
    half = normal(4).astype(np.float16)
    bfloat16 = (normal(4).view(np.uint32) >> 16).astype(np.uint16)
    widened = (bfloat16.astype(np.uint32) << 16).view(np.float32)
    if name != "BF16":
        back = unpack_matrix(pack_matrix(half, QUANT_TYPES[name], None, name="m"), QUANT_TYPES[name], COLUMNS)
        np.testing.assert_array_equal(back, half.astype(np.float32))
    if name != "F16":
        back = unpack_matrix(pack_matrix(bfloat16, QUANT_TYPES[name], None, name="m"), QUANT_TYPES[name], COLUMNS)
        np.testing.assert_array_equal(back, widened)


def test_large_float_matrices_are_converted_in_chunks() -> None:
    matrix = normal(5, (700, 4096))
    packed = pack_matrix(matrix, QUANT_TYPES["BF16"], None, name="m")
    np.testing.assert_array_equal(packed, ggml_oracle.quantize(matrix, "BF16"))
    matrix[650, 7] = np.nan
    with pytest.raises(InputError, match="row 650, column 7"):
        pack_matrix(matrix, QUANT_TYPES["BF16"], None, name="m")


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_values_that_are_not_finite_are_refused_by_every_type(name: str) -> None:
    matrix = normal(6)
    # All bits set: adding the rounding of bfloat16 to this NaN would carry into a zero.
    matrix[31, 300] = np.array(0xFFFFFFFF, np.uint32).view(np.float32)
    message = f"^blk.1: nan in row 31, column 300 cannot be stored as {name}; the checkpoint may be damaged$"
    with pytest.raises(InputError, match=message):
        pack_matrix(matrix, QUANT_TYPES[name], np.ones(COLUMNS, np.float32), name="blk.1")


@pytest.mark.parametrize(("name", "value"), [("F16", 70000.0), ("F16", -65520.0), ("BF16", 3.4e38)])
def test_values_too_large_for_a_float_type_are_refused(name: str, value: float) -> None:
    matrix = normal(6)
    matrix[3, 5] = value
    with pytest.raises(InputError, match=f"in row 3, column 5 cannot be stored as {name}; choose F32 for this tensor"):
        pack_matrix(matrix, QUANT_TYPES[name], None, name="blk.1")


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"blk.1: rows of 300 weights do not fit Q2_K, which needs a multiple of 256"):
        pack_matrix(normal(1)[:, :300], Q2_K, None, name="blk.1")
    with pytest.raises(InputError, match=r"blk.1: dtype float64 found, float32, float16 or bfloat16"):
        pack_matrix(normal(1).astype(np.float64), Q2_K, None, name="blk.1")
    with pytest.raises(InputError, match=r"blk.1: importance of column 0: -1.0 found"):
        pack_matrix(normal(1), Q2_K, np.full(COLUMNS, -1, np.float32), name="blk.1")
    with pytest.raises(InputError, match=r"packed array of shape \(2, 83\): rows of 256 weights in Q2_K expected"):
        unpack_matrix(np.zeros((2, 83), np.uint8), Q2_K, 256)


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XS", "IQ3_S"])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_experts_come_in_order_with_their_own_importance(name: str, threads: int) -> None:
    importance = normal(8, (EXPERTS, COLUMNS)) ** 2
    packed = list(packed_chunks(expert_tensor(), QUANT_TYPES[name], importance, threads))
    assert len(packed) == EXPERTS
    for expert, matrix in enumerate(packed):
        np.testing.assert_array_equal(matrix, ggml_oracle.quantize(normal(expert), name, importance[expert]))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_no_more_experts_are_read_ahead_than_threads(threads: int) -> None:
    lock = threading.Lock()
    read: list[int] = []

    def counted(expert: int) -> np.ndarray:
        with lock:
            read.append(expert)
        return normal(expert)

    for taken, _ in enumerate(packed_chunks(expert_tensor(counted), QUANT_TYPES["Q8_0"], None, threads), 1):
        assert len(read) <= taken - 1 + threads  # the one taken is in memory too: threads + 1


@pytest.mark.parametrize("name", ["Q2_K", "Q8_0", "F16", "IQ2_XXS", "IQ4_NL"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_single_matrix_is_split_by_rows_into_the_same_bytes(name: str, threads: int) -> None:
    matrix = normal(9, (1301, COLUMNS))
    importance = normal(8, (1, COLUMNS)) ** 2
    tensor = dense_tensor(matrix)
    packed = list(packed_chunks(tensor, QUANT_TYPES[name], importance, threads))
    assert len(packed) == n_chunks(tensor) == 3
    together = pack_matrix(matrix, QUANT_TYPES[name], importance[0], name="m")
    np.testing.assert_array_equal(np.concatenate(packed), together)


def test_of_a_large_matrix_a_few_rows_are_read_at_a_time() -> None:
    matrix = normal(9, (2000, COLUMNS))
    most = 0

    def read(_: int, rows: slice = ALL_ROWS) -> np.ndarray:
        nonlocal most
        part = matrix[rows]
        most = max(most, len(part))
        return part

    list(packed_chunks(dense_tensor(matrix, read=read), Q2_K, None, 2))
    assert most * COLUMNS <= 1 << 18


def test_a_vector_is_one_row() -> None:
    vector = normal(10, (96,))
    (packed,) = packed_chunks(dense_tensor(vector, Role.KEEP), QUANT_TYPES["F32"], None, 2)
    np.testing.assert_array_equal(packed.view(np.float32), vector[None])


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_names_tensor_and_expert(threads: int) -> None:
    def damaged(expert: int) -> np.ndarray:
        matrix = normal(expert)
        if expert == 5:
            matrix[2, 3] = np.inf
        return matrix

    packed = packed_chunks(expert_tensor(damaged), Q2_K, None, threads)
    for _ in range(5):
        next(packed)
    with pytest.raises(InputError, match=r"blk.3.ffn_up_exps.weight, expert 5: inf in row 2, column 3"):
        next(packed)


def test_an_error_in_a_split_matrix_names_its_row() -> None:
    matrix = normal(9, (1301, COLUMNS))
    matrix[1290, 1] = np.nan
    with pytest.raises(InputError, match=r"blk.0.attn_q.weight: nan in row 1290, column 1"):
        list(packed_chunks(dense_tensor(matrix), Q2_K, None, 2))


def test_importance_of_another_shape_is_refused() -> None:
    importance = np.ones((EXPERTS - 1, COLUMNS), np.float32)
    with pytest.raises(InputError, match=r"importance of shape \(7, 512\) .* expected, \(6, 512\) found"):
        list(packed_chunks(expert_tensor(), Q2_K, importance, 2))


def test_a_matrix_of_another_shape_is_refused() -> None:
    tensor = expert_tensor(lambda expert: normal(expert, (ROWS, 256)))
    with pytest.raises(InputError, match=r"expert 0: shape \(40, 512\) expected, \(40, 256\) found in the checkpoint"):
        list(packed_chunks(tensor, Q2_K, None, 2))


def test_closing_the_iterator_stops_its_threads() -> None:
    before = threading.active_count()
    packed = packed_chunks(expert_tensor(), Q2_K, None, 3)
    next(packed)
    packed.close()  # type: ignore[attr-defined]  # it is a generator
    assert threading.active_count() == before
