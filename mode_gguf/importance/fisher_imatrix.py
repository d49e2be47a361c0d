"""The Fisher importance matrix: columns weighed by the KL divergence that errors in them cause.

For small changes KL ~ 1/2 E[(g . d)^2], with g(t) the gradient at a matrix's output for token t and d(t) the change of
that output (see `fisher`). An error in column i of row r changes output r by the error times x(t, i); errors of one
variance, independent of each other, therefore cost

    sum over tokens t of |g(t)|^2 * x(t, i)^2

in column i: the plain matrix's sum of squares with every token weighed by its squared gradient. The sums of each kind
of answer are divided by its scored positions and added, as the costs of the "mode" preset are, so that packing and
planning minimise the same thing; gradients already say how much a token matters, whatever its modality.

Few tokens make a noisy sum, and gradients differ by orders of magnitude between tokens, so that a handful of an
expert's can hold most of the weight. Its columns are shrunk towards those of the whole layer by the number of tokens
of equal weight that would be as noisy, (sum w)^2 / sum w^2 (Kish's effective sample size).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mode_gguf.forward.distributed import sum_over_ranks

PRIOR_TOKENS = 32.0
"""Effective tokens at which an expert's own columns and the layer's weigh alike; not tuned."""


@dataclass(frozen=True, slots=True)
class ColumnSums:
    """Weighted sums over the input tokens of E matrices of one layer and projection.

    Attributes:
        squares: float64 (E, n) sum of weight times squared input.
        weight: float64 (E,) sum of the tokens' weights; weight2: of their squares.
        tokens: int64 (E,).
    """

    squares: np.ndarray
    weight: np.ndarray
    weight2: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, n_experts: int, width: int) -> "ColumnSums":
        """Sums of no tokens yet."""
        return cls(
            np.zeros((n_experts, width)), np.zeros(n_experts), np.zeros(n_experts), np.zeros(n_experts, np.int64)
        )

    def add(self, inputs: Tensor, weight: Tensor, expert: int = 0) -> None:
        """Add tokens' inputs (S, n), weighed by `weight` (S,), to one matrix."""
        weight = weight.double()
        self.squares[expert] += (weight @ inputs.double().square()).cpu().numpy()
        self.weight[expert] += float(weight.sum())
        self.weight2[expert] += float(weight.square().sum())
        self.tokens[expert] += len(weight)

    def over_ranks(self) -> "ColumnSums":
        """The sums over the tokens of every process."""
        return ColumnSums(**sum_over_ranks({one.name: getattr(self, one.name) for one in fields(self)}))

    def entry(self, prior_tokens: float = PRIOR_TOKENS) -> tuple[np.ndarray, np.ndarray]:
        """Entry of an `Imatrix`: in_sum2 (E, n) and whole counts (E,), float32; every matrix's importance has mean 1.

        Packing asks only how columns compare within a matrix, and mean 1 keeps ggml's float32 search far from
        underflow, which squared gradients would not.
        """
        layer = _mean_one(self.squares.sum(axis=0, keepdims=True))
        effective = self.weight**2 / np.maximum(self.weight2, np.finfo(np.float64).tiny)
        trust = (effective / (effective + prior_tokens) if len(effective) > 1 else np.ones(1))[:, None]
        importance = trust * _mean_one(self.squares) + (1 - trust) * layer
        counts = np.maximum(self.tokens, 1)
        return (importance * counts[:, None]).astype(np.float32), counts.astype(np.float32)


def squared_norms(gradients: Tensor) -> Tensor:
    """Squared norm of every token's gradient (D, S, rows), averaged over draws: float64 (S,)."""
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=-1, dtype=torch.float64)
    return norms.square().mean(0)


def _mean_one(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to mean 1; one without any weight counts all columns alike."""
    mean = rows.mean(axis=-1, keepdims=True)
    scaled: np.ndarray = np.where(mean > 0, rows / np.where(mean > 0, mean, 1), 1.0)
    return scaled
