"""Costs that are beyond the range of the numbers they are added up in."""

import numpy as np
import pytest

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InputError
from mode_gguf.importance.sensitivity_table import check_costs
from mode_gguf.quantization.types import QUANT_TYPES

TYPES = [QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K")]
TENSOR = SourceTensor("blk.0.ffn_up_exps.weight", (4, 8, 256), Role.EXPERT, (), lambda *_: np.zeros(1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("kind", "shape", "place", "says"),
    [
        ("expert", (2, 3, 4, 3), (1, 2, 3, 1), "expert 3, in Q3_K"),
        ("weight_error", (4, 3), (2, 2), "expert 2, in Q4_K"),
        ("unit", (2, 3, 3), (1, 1, 0), r"ffn_up_exps\.weight in Q2_K"),
    ],
)
def test_what_is_not_finite_is_named(
    kind: str, shape: tuple[int, ...], place: tuple[int, ...], says: str, value: float
) -> None:
    costs = np.zeros(shape)
    arrays = {f"{TENSOR.name}.{kind}": costs}
    check_costs(arrays, TENSOR, TYPES, [True] * 3)
    costs[place] = value
    with pytest.raises(InputError, match=says):
        check_costs(arrays, TENSOR, TYPES, [True] * 3)


def test_types_that_do_not_fit_have_no_costs() -> None:
    costs = np.zeros((4, 3))
    costs[:, 1] = np.nan
    check_costs({f"{TENSOR.name}.weight_error": costs}, TENSOR, TYPES, [True, False, True])
