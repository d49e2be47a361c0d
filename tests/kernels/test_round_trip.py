"""Round-trip error: no weight is farther from its own than the nearest value that its block can express."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf_kernels import TYPES, unpack
from tests.kernels import ggml_oracle
from tests.kernels.modes import EXACT, MODES_AND_TYPES, Mode, mode_id

COLUMNS = 512
F = np.float32

LEVEL_FIELDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "Q2_K": ((16, 80, 2),),
    "Q3_K": ((32, 96, 2), (0, 32, 1)),
    "Q4_K": ((16, 144, 4),),
    "Q5_K": ((48, 176, 4), (16, 48, 1)),
    "Q6_K": ((0, 128, 4), (128, 192, 2)),
    "Q8_0": ((2, 34, 8),),
    "Q4_0": ((2, 18, 4),),
    "Q4_1": ((4, 20, 4),),
    "Q5_0": ((6, 22, 4), (2, 6, 1)),
    "Q5_1": ((8, 24, 4), (4, 8, 1)),
    "IQ4_NL": ((2, 18, 4),),
}
"""Fields of a block's levels: first byte, last byte + 1, bits per weight; lowest bits of the level first."""


SETTLED_BY_SEARCH = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
"""Types whose levels libggml leaves as they were chosen before the scale was fitted to them."""


def expressible(packed: np.ndarray, type_name: str) -> np.ndarray:
    """Every value each weight could have with the scales that are stored: (levels, rows, COLUMNS)."""
    blocks = packed.reshape(-1, TYPES[type_name].block_bytes)
    values = []
    for level in range(1 << sum(bits for _, _, bits in LEVEL_FIELDS[type_name])):
        changed, rest = blocks.copy(), level
        for first, last, bits in LEVEL_FIELDS[type_name]:
            repeated = 0xFF // ((1 << bits) - 1)  # one 1 per field of a byte
            changed[:, first:last] = (rest & ((1 << bits) - 1)) * repeated
            rest >>= bits
        values.append(unpack(changed.reshape(packed.shape), type_name, COLUMNS))
    return np.stack(values)


def drawn(seed: int, rows: int, exponent: float, tail: float, offset: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    shape = rows, COLUMNS
    weights = generator.standard_t(tail, shape) if tail else generator.standard_normal(shape)
    matrix: np.ndarray = ((weights + offset) * 10.0**exponent).astype(F)
    return matrix


DRAWS = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.integers(1, 20),
    "exponent": st.floats(-6, 2),
    "tail": st.sampled_from((0.0, 1.5, 4.0)),
    "offset": st.sampled_from((0.0, 0.0, 3.0, -10.0)),
    "kept": st.sampled_from((None, 1.0, 0.5)),
}


def importance_of(seed: int, kept: float | None) -> np.ndarray | None:
    if kept is None:
        return None
    generator = np.random.default_rng(seed + 1)
    return (generator.standard_normal(COLUMNS) ** 2 * (generator.random(COLUMNS) < kept)).astype(F)


@pytest.mark.parametrize(
    ("mode", "type_name"),
    [(mode, name) for mode, name in MODES_AND_TYPES if mode is not EXACT or name not in SETTLED_BY_SEARCH],
    ids=mode_id,
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(**DRAWS)
def test_each_weight_becomes_the_nearest_value_its_block_can_express(
    mode: Mode, type_name: str, seed: int, rows: int, exponent: float, tail: float, offset: float, kept: float | None
) -> None:
    """Half a step of the stored scale within the range of levels; beyond it, the distance to its end."""
    matrix = drawn(seed, rows, exponent, tail, offset).astype(np.float64)
    packed = mode.without_gain().pack(matrix.astype(F), type_name, importance_of(seed, kept))
    unpacked = unpack(packed, type_name, COLUMNS)
    values = np.sort(expressible(packed, type_name).astype(np.float64), axis=0)
    step = np.diff(values, axis=0).max(axis=0)
    nearest = np.abs(values - matrix).min(axis=0)
    # float32 arithmetic; and Q8_0 decides by the scale before that is rounded to float16 (by 2^-11 of it or, if it is
    # denormal, by 2^-25). That moves the border between levels by up to 127 times as much, and both distances apart by
    # twice that.
    slack = 1e-6 * np.abs(values).max(axis=0) + 1e-5 * step
    if type_name == "Q8_0":
        slack = slack + 2 * 127 * np.maximum(2**-11 * step, 2.0**-25)
    assert (np.abs(unpacked - matrix) <= nearest + slack).all()
    inside = (values[0] <= matrix) & (matrix <= values[-1])
    assert (np.abs(unpacked - matrix)[inside] <= (step / 2 + slack)[inside]).all()


@pytest.mark.parametrize(("mode", "type_name"), MODES_AND_TYPES, ids=mode_id)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(**DRAWS | {"rows": st.integers(12, 20), "tail": st.sampled_from((0.0, 4.0))})
def test_packing_unpacked_weights_loses_at_most_half_of_what_packing_did(
    mode: Mode, type_name: str, seed: int, rows: int, exponent: float, tail: float, offset: float, kept: float | None
) -> None:
    """At most 0.30 was seen, for Q5_K; tails heavier than these break it, in libggml too."""
    importance = importance_of(seed, kept)
    matrix = drawn(seed, rows, exponent, tail, offset)
    once = unpack(mode.pack(matrix, type_name, importance), type_name, COLUMNS)
    twice = unpack(mode.pack(once, type_name, importance), type_name, COLUMNS)
    weight = 1.0 if importance is None else importance.astype(np.float64)
    first, second = (np.sum(weight * (b.astype(np.float64) - a) ** 2) for a, b in ((matrix, once), (once, twice)))
    assert second <= first / 2


@pytest.mark.parametrize(("mode", "type_name"), MODES_AND_TYPES, ids=mode_id)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(**DRAWS)
def test_packed_weights_unpack_to_the_bits_of_libggml(
    mode: Mode, type_name: str, seed: int, rows: int, exponent: float, tail: float, offset: float, kept: float | None
) -> None:
    packed = mode.pack(drawn(seed, rows, exponent, tail, offset), type_name, importance_of(seed, kept))
    expected = ggml_oracle.dequantize(packed, type_name, COLUMNS)
    np.testing.assert_array_equal(unpack(packed, type_name, COLUMNS).view(np.uint32), expected.view(np.uint32))
