"""What "the average is so many bits" means for units whose sizes come in steps."""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np

from mode_gguf.allocation.units import AllocationUnit

MAX_STEPS = 1_000_000
"""Budgets of more steps than this are not searched for a sum that meets them: there are always some very near."""


class SizeRange(NamedTuple):
    """Bytes that units must occupy together at least, and may at most."""

    floor: int
    budget: int


def filled_range(units: Sequence[AllocationUnit], budget: int, undershoot: float) -> SizeRange:
    """The range that stands for "exactly `budget` bytes": the largest sum of sizes that does not exceed it, alone.

    Args:
        units: what will be solved for.
        budget: bytes.
        undershoot: share of the budget that may stay unused where sums are too many to be searched, as with sizes that
            have no common step; those of experts of one shape have one.
    """
    largest = largest_size(units, budget)
    return SizeRange(int(budget * (1 - undershoot)) + 1, budget) if largest is None else SizeRange(largest, largest)


def largest_size(units: Sequence[AllocationUnit], budget: int) -> int | None:
    """The largest sum of one size per unit that is at most `budget`; None if sums are too many to be searched.

    Where every sum exceeds the budget, it is the budget itself, which is then infeasible.
    """
    smallest = [min(candidate.size_bytes for candidate in unit.candidates) for unit in units]
    steps = [{c.size_bytes - least for c in unit.candidates} for unit, least in zip(units, smallest, strict=True)]
    room, step = budget - sum(smallest), int(np.gcd.reduce(sorted(set().union(*steps))))
    if room < 0 or step == 0:
        return min(budget, sum(smallest))
    if room // step > MAX_STEPS:
        return None
    reachable, mask = 1, (1 << (room // step + 1)) - 1  # bit n: a sum n steps above the smallest
    for unit_steps in steps:
        reachable = mask & reduce(or_, (reachable << grown // step for grown in unit_steps))
    return sum(smallest) + (reachable.bit_length() - 1) * step
