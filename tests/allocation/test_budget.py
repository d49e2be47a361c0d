"""Budgets: bytes meant by each kind, and refusals that say what can be reached."""

import pytest

from mode_gguf.allocation.budget import Budget, budget_bytes, check_reachable, effective_types
from mode_gguf.allocation.units import DEFAULT_TYPES, tensor_bytes
from mode_gguf.errors import InfeasibleBudgetError
from tests.allocation.test_planner import model


def test_the_three_kinds_mean_their_bytes() -> None:
    tensors = model()
    weights = sum(tensor.n_weights for tensor in tensors)
    assert budget_bytes(tensors, DEFAULT_TYPES, Budget(value=3.0)) == int(3.0 * weights / 8)
    assert budget_bytes(tensors, DEFAULT_TYPES, Budget(kind="size", value=10**6), overhead=1000) == 10**6 - 1000

    budget = Budget(kind="expert-bpw", value=3.0)
    types = effective_types(DEFAULT_TYPES, budget)
    assert [dense.name for dense in types.dense] == ["Q8_0"]
    experts = sum(tensor.n_weights for tensor in tensors if tensor.n_experts > 1)
    others = sum(tensor_bytes(tensor, types.of(tensor)[0]) for tensor in tensors if tensor.n_experts == 1)
    assert budget_bytes(tensors, types, budget) == int(3.0 * experts / 8) + others


@pytest.mark.parametrize(
    ("budget", "option"),
    [
        (Budget(value=2.0), "--bpw 2 .* bits per weight"),
        (Budget(kind="size", value=5 * 10**5), r"--size 0\.48MiB .* MiB"),
        (Budget(kind="expert-bpw", value=9.0), "--expert-bpw 9 .* bits per weight"),
    ],
)
def test_out_of_reach_names_the_option_and_the_range(budget: Budget, option: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=option):
        check_reachable(model(), DEFAULT_TYPES, budget, overhead=1000)
