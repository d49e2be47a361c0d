"""Second moments of what matrices read, as rounding needs them.

Rounding a row w to q changes its output for an input x by (w - q) x; summed over weighed inputs the square of that is
(w - q) H (w - q)' with H = sum of weight * x x'.
"""

import numpy as np
import torch
from torch import Tensor

from mode_gguf_kernels import Feedback

DAMPING = 0.3
"""Of the mean of H's diagonal, added to the diagonal (docs/experiments/rounding.md, "Damping").

Inputs of the calibration samples are not those of later use; damping is what directions that they leave out count.
"""

DOWN_DAMPING = 1.0
"""The same for experts' down projections: what they read is known from the expert's own tokens alone."""

SHARED = 1.0
"""Of what all tokens of a layer read, added to what an expert's own tokens do (see `with_shared`)."""

MIN_TOKENS = 8
"""An expert that fewer tokens of equal weight reached is rounded to nearest: its moments say next to nothing."""


_TOGETHER = 16384
"""Tokens that are weighed at a time: in float32 they take twice as much room as the inputs do."""


class Moments:
    """H of one matrix, added up over samples: float32 (n, n) on the inputs' device."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, width, device=device)
        self._weight = 0.0
        self._weight2 = 0.0

    def add(self, inputs: Tensor, weight: Tensor) -> None:
        """Add tokens' inputs (S, n), weighed by `weight` (S,), not negative."""
        weight = weight.to(inputs.device, torch.float32)
        for first in range(0, len(inputs), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            scaled = inputs[some].float() * weight[some].sqrt()[:, None]
            self.sums.addmm_(scaled.T, scaled)
        self._weight += float(weight.double().sum())
        self._weight2 += float(weight.double().square().sum())

    @property
    def effective_tokens(self) -> float:
        """Tokens of equal weight that would say as much, (sum w)^2 / sum w^2 (Kish)."""
        return self._weight**2 / self._weight2 if self._weight2 > 0 else 0.0


def with_shared(own: Tensor, shared: Tensor) -> Tensor:
    """An expert's moments, steadied by those of its layer: what few tokens leave open, the layer's tokens decide.

    Args:
        own: H of the tokens that reached the expert, float32 (n, n), not all zero.
        shared: H of all tokens of the layer, likewise.
    """
    return own / own.diagonal().mean() + SHARED / shared.diagonal().mean() * shared


def feedback_of(moments: Tensor, damping: float = DAMPING) -> Feedback:
    """What rounding needs: H scaled to a mean diagonal of 1 and damped, and the U of H = U D U'.

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
