"""KL against closed forms and its own laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.validation.divergence import Scores, compare, log_softmax


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


def listed(log_probs: np.ndarray, top: int, came: int) -> np.ndarray:
    """The `top` most likely tokens of each row and the one that came; NaN elsewhere."""
    kept = np.full_like(log_probs, np.nan)
    chosen = np.argsort(-log_probs, axis=1)[:, :top]
    np.put_along_axis(kept, chosen, np.take_along_axis(log_probs, chosen, 1), 1)
    kept[:, came] = log_probs[:, came]
    return kept


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 20),
    of_p=st.integers(1, 60),
    of_q=st.integers(1, 60),
    shift=st.floats(0, 5),
)
def test_truth_lies_within_what_truncation_leaves(seed: int, rows: int, of_p: int, of_q: int, shift: float) -> None:
    p = log_softmax(logits(rows, 60, seed))
    q = log_softmax(p + shift * logits(rows, 60, seed + 1) / 3)
    tokens = [seed % 60] * rows
    truth = compare(p, q, tokens)
    for left in (p, listed(p, of_p, tokens[0])):
        scores = compare(left, listed(q, of_q, tokens[0]), tokens)
        assert (scores.kl <= truth.kl + 1e-6).all()
        assert (truth.kl <= scores.kl + scores.hidden + 1e-6).all()
        np.testing.assert_allclose(scores.nll, truth.nll)
        np.testing.assert_array_equal(scores.same_top1, truth.same_top1)


def test_more_listed_hides_less() -> None:
    p, q = (log_softmax(logits(50, 400, seed)) for seed in (1, 2))
    tokens = [3] * 50
    found = [compare(p, listed(q, top, 3), tokens) for top in (5, 50, 300, 400)]
    assert (np.diff([scores.kl.mean() for scores in found]) >= 0).all()
    assert (np.diff([scores.hidden.mean() for scores in found]) < 0).all()
    assert found[-1].hidden.max() == 0
    np.testing.assert_allclose(found[-1].kl, compare(p, q, tokens).kl)


def test_token_that_is_not_listed_counts_as_the_least_that_is() -> None:
    p, q = (log_softmax(logits(1, 9, seed)) for seed in (1, 2))
    least = int(q.argmin())
    assert compare(p, listed(q, 4, int(q.argmax())), [least]).nll[0] == pytest.approx(-np.sort(q[0])[-4])


def test_positions_that_nothing_is_known_of_are_left_out() -> None:
    p, q = logits(5, 9, 1), log_softmax(logits(5, 9, 2)).astype(np.float32)
    q[[1, 4]] = np.nan
    scores = compare(p, q, [0, 1, 2, 3, 4])
    expected = compare(p[[0, 2, 3]], q[[0, 2, 3]], [0, 2, 3])
    np.testing.assert_array_equal(scores.kl, expected.kl)
    np.testing.assert_array_equal(scores.nll, expected.nll)
