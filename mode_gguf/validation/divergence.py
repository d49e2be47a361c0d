"""KL divergence of one model's next-token distributions from another's, position by position.

KL(p || q) = sum over the whole vocabulary of p (log p - log q), in nats; p is the reference. Computed in float64 from
log-softmax, a few rows at a time, because a vocabulary of 152 k in float64 takes 1.2 MB a row.

Of a model behind HTTP the most likely tokens are known and the others are NaN. Then all tokens that are not known of
both models count as one, R. That gives a KL which the full one is never below (log-sum inequality), and what it hides
is P(R) KL(p within R || q within R). No list of q's largest values bounds that from above, because q may be as small as
it likes; `LEAST_LOG_PROB` is what we assume about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray

LEAST_LOG_PROB: Final = -60.0
"""No token that is not listed is taken to be less likely than this (9e-27), in the bound on what truncation hides."""

_ROWS: Final = 16
_LEAST_MASS: Final = 1e-9
"""Probability mass of tokens that are not listed, at least."""
_ROUNDING: Final = 1e-5
"""Rounding error by which a server's probabilities, normalised in float32, may add up to more than 1."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One value per scored position, all of shape (positions,).

    Attributes:
        kl: float64, nats from the reference to the candidate; where not all is known of both, what it is at least.
        hidden: float64, how much larger `kl` may be at most; 0 where everything is known.
        same_top1: bool, whether both would pick the same token.
        nll: float64, the candidate's negative log-likelihood of the token that came, nats.
        reference_nll: float64, the reference's.
    """

    kl: Array
    hidden: Array
    same_top1: Array
    nll: Array
    reference_nll: Array

    @staticmethod
    def joined(parts: Sequence["Scores"]) -> "Scores":
        """The positions of all `parts`, at least one, in order."""
        return Scores(*(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Scores)))


def log_softmax(logits: Array) -> Array:
    """float64 log-probabilities of `logits` (..., vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def compare(reference: Array, candidate: Array, tokens: Sequence[int]) -> Scores:
    """Compare two models over the same positions.

    Args:
        reference: (positions, vocabulary) logits or log-probabilities of p; a constant per row changes nothing. Rows
            with NaN, of which not all is known, must be log-probabilities.
        candidate: the same of q.
        tokens: (positions,) the token that came at each position.

    Positions where nothing is known of one of them are left out.
    """
    known = ~(np.isnan(reference).all(axis=-1) | np.isnan(candidate).all(axis=-1))
    if not known.all():
        reference, candidate, tokens = reference[known], candidate[known], np.asarray(tokens)[known].tolist()
    positions = len(tokens)
    kl, hidden, nll, reference_nll = (np.zeros(positions) for _ in range(4))
    for start in range(0, positions, _ROWS):
        rows = slice(start, min(start + _ROWS, positions))
        log_p, log_q = _log_probs(reference[rows]), _log_probs(candidate[rows])
        if np.isnan(log_p).any() or np.isnan(log_q).any():
            kl[rows], hidden[rows] = _truncated(log_p, log_q)
        else:
            kl[rows] = _divergence(log_p, log_q)
        came = (np.arange(len(log_p)), np.asarray(tokens[rows]))
        nll[rows], reference_nll[rows] = -_at(log_q, came), -_at(log_p, came)
    same = np.nanargmax(reference, axis=-1) == np.nanargmax(candidate, axis=-1)
    return Scores(np.maximum(kl, 0.0), hidden, same, nll, reference_nll)


def _log_probs(rows: Array) -> Array:
    """float64 log-probabilities; those of which not all is known are normalised already."""
    normalised: Array = rows.astype(np.float64) if np.isnan(rows).any() else log_softmax(rows)
    return normalised


def _divergence(log_p: Array, log_q: Array) -> Array:
    # A token that p rules out adds nothing, whatever q says; without the mask it would add 0 * inf.
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=log_p > -np.inf)
    total: Array = (np.exp(log_p) * ratio).sum(axis=-1)
    return total


def _truncated(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """Lower bound of the KL divergence, and the width up to its upper bound, where NaN are unknown."""
    known = ~np.isnan(log_p) & ~np.isnan(log_q)
    p = np.exp(log_p, where=~np.isnan(log_p), out=np.zeros_like(log_p))
    listed = _divergence(np.where(known, log_p, -np.inf), np.where(known, log_q, 0.0))
    rest_p = np.maximum(1 - np.where(known, p, 0.0).sum(axis=-1), _LEAST_MASS)
    rest_q = np.maximum(1 - np.where(known, np.exp(log_q), 0.0).sum(axis=-1), 0.0) + _ROUNDING
    least = listed + rest_p * np.log(rest_p / rest_q)
    # p log p of the rest: exact where p is known; elsewhere no token is likelier than the last one on p's list.
    alone = ~np.isnan(log_p) & ~known
    entropy = (p * np.where(alone, log_p, 0.0)).sum(axis=-1)
    unlisted = np.maximum(rest_p - np.where(alone, p, 0.0).sum(axis=-1), 0.0)
    entropy += unlisted * np.minimum(np.nanmin(log_p, axis=-1), np.log(np.maximum(unlisted, _LEAST_MASS)))
    most = listed + entropy - rest_p * LEAST_LOG_PROB
    return least, np.maximum(most - least, 0.0)


def _at(log_probs: Array, came: tuple[Array, Array]) -> Array:
    """Log-probabilities of the tokens that came; of one that is not listed, of the least likely that is."""
    found: Array = log_probs[came]
    missing = np.isnan(found)
    if missing.any():
        found[missing] = np.nanmin(log_probs[missing], axis=-1)
    return found
