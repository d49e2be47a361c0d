"""How far one model's next-token distributions are from another's, position by position.

KL(p || q) = sum over the whole vocabulary of p (log p - log q), in nats; p is the reference. Computed in float64 from
log-softmax, a few rows at a time, because a vocabulary of 152 k in float64 takes 1.2 MB a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray

_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Scores:
    """One value per scored position, all of shape (positions,).

    Attributes:
        kl: float64, nats from the reference to the candidate.
        same_top1: bool, whether both would pick the same token.
        nll: float64, the candidate's negative log-likelihood of the token that came, nats.
        reference_nll: float64, the reference's.
    """

    kl: Array
    same_top1: Array
    nll: Array
    reference_nll: Array

    @staticmethod
    def joined(parts: Sequence["Scores"]) -> "Scores":
        """The positions of all `parts`, at least one, in order."""
        return Scores(
            kl=np.concatenate([part.kl for part in parts]),
            same_top1=np.concatenate([part.same_top1 for part in parts]),
            nll=np.concatenate([part.nll for part in parts]),
            reference_nll=np.concatenate([part.reference_nll for part in parts]),
        )


def log_softmax(logits: Array) -> Array:
    """float64 log-probabilities of `logits` (..., vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def compare(reference: Array, candidate: Array, tokens: Sequence[int]) -> Scores:
    """Compare two models over the same positions.

    Args:
        reference: (positions, vocabulary) logits or log-probabilities of p; a constant per row changes nothing.
        candidate: the same of q.
        tokens: (positions,) the token that came at each position.
    """
    positions = len(tokens)
    kl, nll, reference_nll = np.empty(positions), np.empty(positions), np.empty(positions)
    for start in range(0, positions, _ROWS):
        rows = slice(start, min(start + _ROWS, positions))
        log_p, log_q = log_softmax(reference[rows]), log_softmax(candidate[rows])
        came = (np.arange(len(log_p)), np.asarray(tokens[rows]))
        # A token that p rules out adds nothing, whatever q says; without the mask it would add 0 * inf.
        ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=log_p > -np.inf)
        kl[rows] = (np.exp(log_p) * ratio).sum(axis=-1)
        nll[rows] = -log_q[came]
        reference_nll[rows] = -log_p[came]
    same = reference.argmax(axis=-1) == candidate.argmax(axis=-1)
    return Scores(np.maximum(kl, 0.0), same, nll, reference_nll)
