"""The variants that compare_packing understands."""

from compare_packing import Result, Variant
from mode_gguf.options import Packing
from mode_gguf.quantization.packing import EXACT


def test_a_variant_names_imatrix_and_packing() -> None:
    assert Variant.parse("plain:exact") == Variant("plain:exact", "plain", EXACT)
    assert Variant.parse("fisher:refined").packing == Packing()
    assert Variant.parse("fisher:refined:max:0.5:biased").packing == Packing("refined", "max", 0.5, unbiased=False)


def test_change_is_the_mean_of_both_kinds() -> None:
    base = Result("Q2_K", "plain:exact", 0.04, 0.001, 0.02, 0.001, 5)
    assert Result("Q2_K", "other", 0.03, 0.001, 0.02, 0.001, 5).change(base) == -0.125
