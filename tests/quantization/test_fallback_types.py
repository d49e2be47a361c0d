"""Fallback types of rows that no K-quant fits."""

import pytest

from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, SourceTensor
from mode_gguf.quantization.fallback_types import FALLBACK_TYPES, fallback_types_of, stored_as
from mode_gguf.quantization.types import QUANT_TYPES, parse_types


def tensor(width: int, activation: str | None = "m") -> SourceTensor:
    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        raise AssertionError("types are told from shapes")

    return SourceTensor("m", (4, width), Role.DENSE, ("m",), read, activation)


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("IQ2_XXS", "IQ4_NL"),
        ("Q2_K", "IQ4_NL"),
        ("Q4_K", "IQ4_NL"),
        ("Q5_K", "Q5_0"),
        ("Q6_K", "Q5_1"),
        ("Q8_0", "Q8_0"),
        ("Q4_0", "Q4_0"),
        ("F16", "F16"),
    ],
)
def test_the_nearest_in_bits_stands_in_for_what_does_not_fit(asked: str, stored: str) -> None:
    for width in (96, 704, 1408, 2112, 10944):
        assert stored_as(tensor(width), QUANT_TYPES[asked]) == QUANT_TYPES[stored]
    assert stored_as(tensor(2816), QUANT_TYPES[asked]) == QUANT_TYPES[asked]


def test_rows_that_nothing_fits_and_types_without_their_importance() -> None:
    assert stored_as(tensor(100), QUANT_TYPES["Q4_K"]) is None
    assert stored_as(tensor(100), QUANT_TYPES["F16"]) == QUANT_TYPES["F16"]
    assert stored_as(tensor(256, activation=None), QUANT_TYPES["IQ2_XXS"]) is None


def test_fallback_types_are_small_blocks_in_order() -> None:
    assert {one.block_size for one in FALLBACK_TYPES} == {32}
    assert list(FALLBACK_TYPES) == sorted(FALLBACK_TYPES, key=lambda one: one.bits_per_weight)


def test_only_tensors_that_need_them_are_named() -> None:
    types = parse_types("Q2_K,Q6_K,Q8_0")
    assert fallback_types_of([tensor(704)], types) == {"m": ("IQ4_NL", "Q5_1", "Q8_0")}
    assert fallback_types_of([tensor(768)], types) == {}
