"""Second moments of matrices' inputs, for rounding with feedback.

Rounding a row w to q changes its output for an input x by (w - q) x; summed over weighed inputs the square of that is
(w - q) H (w - q)' with H = sum of weight * x x'.
"""

import numpy as np
import torch
from torch import Tensor

from mode_gguf_kernels import Feedback

DAMPING = 0.3
"""Damping: the share of the mean of H's diagonal that is added to it (docs/experiments/rounding.md, "Damping").

Inputs of the calibration samples are not those of later use; damping weighs the directions that they leave out.
"""

DOWN_DAMPING = 1.0
"""Damping of experts' down projections, whose inputs are known from the expert's own tokens alone."""

SHARED_WEIGHT = 1.0
"""Weight of the moments of all tokens of a layer, added to those of an expert's own (see `with_shared`)."""

MIN_TOKENS = 8
"""Effective tokens below which an expert is rounded to nearest: its moments say next to nothing."""


_TOKENS_PER_BLOCK = 16384
"""Tokens that are weighed at a time: in float32 they take twice as much memory as the inputs do."""


class Moments:
    """H of one matrix, added up over samples: float32 (n, n) on the inputs' device."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, width, device=device)
        self._weight = 0.0
        self._weight2 = 0.0

    def add(self, inputs: Tensor, weight: Tensor) -> None:
        """Add tokens' inputs (S, n), weighed by `weight` (S,), not negative."""
        weight = weight.to(inputs.device, torch.float32)
        for first in range(0, len(inputs), _TOKENS_PER_BLOCK):
            block = slice(first, first + _TOKENS_PER_BLOCK)
            scaled = inputs[block].float() * weight[block].sqrt()[:, None]
            self.sums.addmm_(scaled.T, scaled)
        self._weight += float(weight.double().sum())
        self._weight2 += float(weight.double().square().sum())

    @property
    def effective_tokens(self) -> float:
        """Kish's effective sample size, (sum w)^2 / sum w^2."""
        return self._weight**2 / self._weight2 if self._weight2 > 0 else 0.0

    @property
    def is_informative(self) -> bool:
        """Whether the moments say anything: inputs behind all-zero weights are zero, whatever the token."""
        return float(self.sums.diagonal().mean()) >= torch.finfo(torch.float32).tiny


def with_shared(own: Tensor, shared: Tensor) -> Tensor:
    """An expert's moments, regularised by those of its layer where its tokens are few.

    Args:
        own: H of the tokens that reached the expert, float32 (n, n), not all zero.
        shared: H of all tokens of the layer, likewise.
    """
    return own / own.diagonal().mean() + SHARED_WEIGHT / shared.diagonal().mean() * shared


def feedback_of(moments: Tensor, damping: float = DAMPING) -> Feedback:
    """Feedback of a matrix: H scaled to a mean diagonal of 1 and damped, and the U of H = U D U'.

    Args:
        moments: H, float32 (n, n), symmetric, not negative definite, not all zero.
        damping: of the mean of the diagonal, added to it; above 0.
    """
    damped = moments / moments.diagonal().mean()
    damped.diagonal().add_(damping)
    # Cholesky's factor is lower triangular; reversing both orders makes an upper one of it.
    upper: Tensor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    unit = upper / upper.diagonal()
    return Feedback(damped.cpu().numpy(), np.ascontiguousarray(unit.cpu().numpy()))
