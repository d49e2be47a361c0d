"""Second moments, their effective tokens, and the factor that rounding takes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf.feedback.second_moments import SHARED_WEIGHT, Moments, feedback_of, with_shared

CPU = torch.device("cpu")


def drawn(seed: int, tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def test_moments_are_sums_of_weighed_outer_products() -> None:
    x, weight = drawn(1, 50, 16), drawn(2, 50, 1)[:, 0].abs()
    moments = Moments(16, CPU)
    moments.add(x[:20], weight[:20])
    moments.add(x[20:], weight[20:])
    expected = torch.einsum("s,si,sj->ij", weight.double(), x.double(), x.double())
    np.testing.assert_allclose(moments.sums.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_effective_tokens() -> None:
    moments = Moments(4, CPU)
    assert moments.effective_tokens == 0
    moments.add(drawn(1, 10, 4), torch.ones(10))
    assert moments.effective_tokens == pytest.approx(10)
    moments.add(drawn(1, 1, 4), torch.tensor([1e6]))
    assert moments.effective_tokens == pytest.approx(1, rel=1e-3)


def test_many_tokens_are_added_up_in_parts() -> None:
    x, weight = drawn(3, 40_000, 4), drawn(4, 40_000, 1)[:, 0].abs()
    moments = Moments(4, CPU)
    moments.add(x, weight)
    expected = torch.einsum("s,si,sj->ij", weight.double(), x.double(), x.double())
    np.testing.assert_allclose(moments.sums.numpy(), expected.numpy(), rtol=1e-3, atol=1)


def test_shared_moments_count_the_same_at_any_scale() -> None:
    own, shared = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    for scale in (1e-6, 1.0, 1e6):
        found = with_shared(own * scale, shared / scale)
        expected = [[0.5 + SHARED_WEIGHT, SHARED_WEIGHT / 2], [SHARED_WEIGHT / 2, 1.5 + SHARED_WEIGHT]]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 80),
    damping=st.floats(0.01, 2),
    exponent=st.integers(-15, 15),
)
def test_the_factor_gives_back_the_damped_moments(seed: int, tokens: int, damping: float, exponent: int) -> None:
    """Up to what is left out: U D U' with D = U^-1 H U'^-1, which must be diagonal; for any rank and scale."""
    x = drawn(seed, tokens, 32).double() * 10.0**exponent
    h = x.T @ x
    feedback = feedback_of(h.float(), damping)
    factor = torch.from_numpy(feedback.factor).double()
    assert (factor.diagonal() == 1).all()
    assert (factor.tril(-1) == 0).all()
    damped = h / h.diagonal().mean() + damping * torch.eye(32)
    np.testing.assert_allclose(feedback.moments, damped.numpy(), rtol=1e-4, atol=1e-4)
    inverse = torch.linalg.inv(factor)
    middle = inverse @ damped @ inverse.T
    left = middle - torch.diag(middle.diagonal())
    assert left.abs().max() < 1e-3 * middle.diagonal().max()
