"""KL against closed forms and its own laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.validation.divergence import Scores, compare


def logits(rows: int, vocabulary: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


def test_two_outcomes_by_hand() -> None:
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    scores = compare(np.log(p)[None], np.log(q)[None] + 5, [1])
    assert scores.kl[0] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert scores.nll[0] == pytest.approx(np.log(2))
    assert scores.reference_nll[0] == pytest.approx(np.log(4))
    assert scores.same_top1[0]


@given(seed=st.integers(0, 1000), rows=st.integers(1, 40), vocabulary=st.integers(2, 50))
def test_laws(seed: int, rows: int, vocabulary: int) -> None:
    p, q = logits(rows, vocabulary, seed), logits(rows, vocabulary, seed + 1)
    tokens = [seed % vocabulary] * rows
    scores = compare(p, q, tokens)
    assert (scores.kl >= 0).all()
    np.testing.assert_array_equal(compare(p, p, tokens).kl, 0)
    np.testing.assert_allclose(compare(p + 100, q - 100, tokens).kl, scores.kl, atol=1e-4)
    np.testing.assert_array_equal(scores.same_top1, p.argmax(1) == q.argmax(1))


def test_token_that_the_reference_rules_out_adds_nothing() -> None:
    p = np.array([[0.0, -np.inf, 0.0]])
    assert compare(p, np.zeros((1, 3)), [0]).kl[0] == pytest.approx(np.log(1.5))


def test_joined_keeps_order() -> None:
    one, two = (compare(logits(n, 9, n), logits(n, 9, n + 5), [3] * n) for n in (2, 3))
    joined = Scores.joined([one, two])
    np.testing.assert_array_equal(joined.kl, [*one.kl, *two.kl])
    assert joined.nll.shape == joined.reference_nll.shape == joined.same_top1.shape == (5,)
