"""The programme's Lagrangian relaxation: a price per byte instead of the size limits.

With a price p the units no longer depend on each other: each takes its candidate of least cost + p size. The best price
gives the relaxation's bound, the same as the linear programme's, and what any other candidate costs more at that price
(its reduced cost) says how far a choice that uses it must lie above the bound. A positive price keeps sizes below the
budget; where costs alone would not even fill the floor, it is negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mode_gguf.allocation.units import AllocationUnit


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The relaxation's optimum, and a start near it that keeps or barely misses the limits.

    Candidates are in the units' own order, padded to the longest list (C).

    Attributes:
        costs: (U, C) float64, inf where there is no candidate.
        sizes: (U, C) int64 bytes.
        start: (U,) int64, a candidate per unit whose reduced cost is zero.
        reduced_costs: (U, C) float64, not negative; inf where there is no candidate.
        bound: no choice within the limits costs less, and one that uses a candidate its reduced cost more at least.
    """

    costs: np.ndarray
    sizes: np.ndarray
    start: np.ndarray
    reduced_costs: np.ndarray
    bound: float

    def total_size(self, chosen: np.ndarray) -> int:
        return int(_picked(self.sizes, chosen).sum())

    def total_cost(self, chosen: np.ndarray) -> float:
        return float(_picked(self.costs, chosen).sum())


def relax(units: Sequence[AllocationUnit], floor: int, budget: int) -> Relaxation | None:
    """Solve the relaxation exactly; None where the smallest choice exceeds `budget` or the largest misses `floor`."""
    costs, sizes = _arrays(units)
    exists = np.isfinite(costs)
    smallest = _cheapest_where(sizes == np.where(exists, sizes, np.iinfo(np.int64).max).min(axis=1)[:, None], costs)
    largest = _cheapest_where(sizes == np.where(exists, sizes, -1).max(axis=1)[:, None], costs)
    if _picked(sizes, smallest).sum() > budget or _picked(sizes, largest).sum() < floor:
        return None
    # Sizes are measured from the start's throughout, so that large common sizes do not eat the digits of small costs.
    free = costs.argmin(axis=1)
    size = int(_picked(sizes, free).sum())
    price, start, target = 0.0, free, size
    if size > budget:
        price, below, above = _best_price(costs, sizes, smallest, free, budget)
        start, target = _between(sizes, below, above, budget), budget
    elif size < floor:
        price, below, above = _best_price(costs, sizes, free, largest, floor - 1)
        start, target = _between(sizes, above, below, floor), floor
    reduced = costs + price * (sizes - _picked(sizes, start)[:, None])
    least = reduced.min(axis=1)
    bound = float(least.sum()) + price * (int(_picked(sizes, start).sum()) - target)
    return Relaxation(costs, sizes, start, reduced - least[:, None], bound)


def _best_price(
    costs: np.ndarray, sizes: np.ndarray, below: np.ndarray, above: np.ndarray, limit: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """The price at which the relaxed choice jumps over `limit`, and the choices on both sides: at most it, and above.

    At the price where both sides cost the same, either that is already the best there is, or a choice between them
    is better and replaces the side it is on; so sizes close in on the limit, and every step is exact.
    """
    origin = sizes.min(axis=1)[:, None]
    while True:
        saved = float((_picked(costs, below) - _picked(costs, above)).sum())
        gained = int((_picked(sizes, above) - _picked(sizes, below)).sum())
        price = saved / gained
        chosen = (costs + price * (sizes - origin)).argmin(axis=1)
        size = int(_picked(sizes, chosen).sum())
        if size <= limit and size > int(_picked(sizes, below).sum()):
            below = chosen
        elif size > limit and size < int(_picked(sizes, above).sum()):
            above = chosen
        else:
            return price, below, above


def _between(sizes: np.ndarray, source: np.ndarray, destination: np.ndarray, target: int) -> np.ndarray:
    """`source` with its first units moved to `destination` as far as that does not cross `target`."""
    steps = _picked(sizes, destination) - _picked(sizes, source)
    distance = target - int(_picked(sizes, source).sum())
    reached = np.cumsum(steps)
    n = int(np.argmax(np.append(np.sign(reached - distance) == np.sign(steps.sum()), True)))
    return np.concatenate([destination[:n], source[n:]])


def _arrays(units: Sequence[AllocationUnit]) -> tuple[np.ndarray, np.ndarray]:
    shape = len(units), max(len(unit.candidates) for unit in units)
    costs, sizes = np.full(shape, np.inf), np.zeros(shape, np.int64)
    for row, unit in enumerate(units):
        n = len(unit.candidates)
        costs[row, :n] = [candidate.cost for candidate in unit.candidates]
        sizes[row, :n] = [candidate.size_bytes for candidate in unit.candidates]
    return costs, sizes


def _cheapest_where(allowed: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(allowed, costs, np.inf).argmin(axis=1))


def _picked(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.asarray(values[np.arange(len(values)), chosen])
