"""Shortcuts of the searches whose exactness can be checked case by case."""

import numba
import numpy as np
import pytest

from mode_gguf_kernels.search import divided
from mode_gguf_kernels.simd import LANES, any_lane, load
from mode_gguf_kernels.tiles import float_tile

F = np.float32


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def wrong_quotients(dividend: np.float32) -> int:
    """Number of runs of LANES significands, of all 2**23, for which `divided` is not the rounded quotient."""
    tile = float_tile(1)
    wrong = 0
    for first in range(0, 1 << 23, LANES):
        for lane in range(LANES):
            tile[lane] = F(1) + F(first + lane) * F(2.0**-23)
        divisor = load(tile, 0)
        if any_lane(divided(dividend, divisor, F(1) / divisor) != dividend / divisor):
            wrong += 1
    return wrong


@pytest.mark.parametrize("highest", [4, 32])
def test_every_numerator_of_an_encoder_is_divided_as_the_processor_divides(highest: int) -> None:
    for step in range(-9, 10):
        assert wrong_quotients(-(F(highest) + F(0.1) * F(step))) == 0
