"""Sizes that a set of units can have exactly, for equality budgets."""

import math
from collections.abc import Sequence
from functools import reduce
from operator import or_

from mode_gguf.allocation.units import AllocationUnit

MAX_STEPS = 1_000_000
"""Sizes of experts of one shape lie on a grid of few steps; budgets of more steps than this are not searched."""


def greatest_size(units: Sequence[AllocationUnit], budget: int) -> int | None:
    """The most bytes, up to `budget`, that one candidate per unit can take together.

    None where not even the smallest candidates fit, or where the units' sizes differ so much that their sums cannot be
    told one by one; then almost any size can be reached.
    """
    sizes = [{candidate.size_bytes for candidate in unit.candidates} for unit in units]
    smallest = sum(map(min, sizes))
    growths = [{size - min(own) for size in own} for own in sizes]
    span, step = budget - smallest, math.gcd(*set().union(*growths)) or 1
    if span < 0 or span // step > MAX_STEPS:
        return None
    reachable, mask = 1, (1 << (span // step + 1)) - 1  # bit n: a sum n steps above the smallest
    for own in growths:
        reachable = mask & reduce(or_, (reachable << growth // step for growth in own))
    return smallest + (reachable.bit_length() - 1) * step
