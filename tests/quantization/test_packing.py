"""Ways of packing: what they mean to the kernels, and which there are not."""

import pytest

from mode_gguf.errors import UsageError
from mode_gguf.quantization.packing import DEFAULT_PACKING, EXACT, Packing
from mode_gguf_kernels import Refinement


def test_exact_asks_the_kernels_for_no_refinement() -> None:
    assert EXACT.refinement is None
    assert not EXACT.is_unbiased


def test_refined_asks_for_what_it_says() -> None:
    assert DEFAULT_PACKING.is_unbiased
    assert DEFAULT_PACKING.refinement == Refinement("default", 0.0, unbiased=True)
    assert Packing("refined", "max", 1.5, unbiased=False).refinement == Refinement("max", 1.5, unbiased=False)
    assert not Packing("refined", unbiased=False).is_unbiased


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rough",), "packing 'rough': choose from exact, refined"),
        (("refined", "some"), "packing effort 'some': choose from fast, default, max"),
        (("refined", "max", -0.5), "size power -0.5"),
        (("refined", "max", 0.25), "size power 0.25"),
    ],
)
def test_what_there_is_not_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Packing(*arguments)  # type: ignore[arg-type]
