"""Ways of packing: what they mean to the kernels, and which there are not."""

import pytest
from pydantic import ValidationError

from mode_gguf.options import Packing
from mode_gguf.quantization.packing import DEFAULT_PACKING, EXACT, refinement_of
from mode_gguf_kernels import Refinement


def test_exact_asks_the_kernels_for_no_refinement() -> None:
    assert refinement_of(EXACT) is None
    assert not EXACT.is_unbiased


def test_refined_asks_for_what_it_says() -> None:
    assert DEFAULT_PACKING.is_unbiased
    assert refinement_of(DEFAULT_PACKING) == Refinement("default", 0.0, unbiased=True)
    assert refinement_of(Packing("refined", "max", 1.5, unbiased=False)) == Refinement("max", 1.5, unbiased=False)
    assert not Packing("refined", unbiased=False).is_unbiased


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rough",), "'exact' or 'refined'"),
        (("refined", "some"), "'fast', 'default' or 'max'"),
        (("refined", "max", -0.5), "greater than or equal to 0"),
        (("refined", "max", 0.25), "0, 0.5, 1, ... 4 expected"),
    ],
)
def test_what_there_is_not_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Packing(*arguments)  # type: ignore[arg-type]
