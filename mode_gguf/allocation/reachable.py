"""Which sizes a set of units can have exactly: what an equality budget can ask for."""

from collections.abc import Sequence

from mode_gguf.allocation.units import AllocationUnit

_MOST_SIZES = 1 << 18
"""Units of one shape have few sums; sizes that hardly repeat have too many to keep, and need none of this."""


def greatest_size(units: Sequence[AllocationUnit], budget: int) -> int | None:
    """The most bytes, up to `budget`, that one candidate per unit can take together.

    None where not even the smallest candidates fit, or where the units' sizes differ so much that their sums cannot be
    told one by one; then almost any size can be reached.
    """
    sums = {0}
    for unit in units:
        sizes = {candidate.size_bytes for candidate in unit.candidates}
        sums = {total + size for total in sums for size in sizes if total + size <= budget}
        if len(sums) > _MOST_SIZES:
            return None
    return max(sums, default=None)
