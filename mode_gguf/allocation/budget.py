"""The byte budget behind a number of bits per weight, and which numbers can be reached at all."""

from collections.abc import Sequence
from dataclasses import dataclass

from mode_gguf.allocation.units import FALLBACK, CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError


@dataclass(frozen=True, slots=True)
class ReachableRange:
    """Bits per weight of the whole text model when every tensor takes its smallest or its largest candidate."""

    lowest_bpw: float
    highest_bpw: float
    limits: tuple[str, ...]
    """What keeps the range where it is, in words: fixed tensors, rows that fit no candidate's block."""


def budget_bytes(tensors: Sequence[SourceTensor], bpw: float) -> int:
    """Bytes that `bpw` bits per weight allow for all tensors of the text model together."""
    return int(bpw * sum(tensor.n_weights for tensor in tensors) / 8)


def reachable_range(tensors: Sequence[SourceTensor], types: CandidateTypes) -> ReachableRange:
    """The bits per weight this model can have with these candidates; needs shapes only, so it runs before anything."""
    weights = sum(tensor.n_weights for tensor in tensors)
    sizes = [[tensor_bytes(tensor, candidate) for candidate in types.of(tensor)] for tensor in tensors]
    lowest = 8 * sum(map(min, sizes)) / weights
    highest = 8 * sum(map(max, sizes)) / weights
    return ReachableRange(lowest, highest, tuple(_limits(tensors, types, weights)))


def check_reachable(tensors: Sequence[SourceTensor], types: CandidateTypes, bpw: float) -> ReachableRange:
    """The reachable range, after checking that `bpw` lies in it.

    Raises:
        InfeasibleBudgetError: it does not; the message gives the range and what limits it.
    """
    reachable = reachable_range(tensors, types)
    if not reachable.lowest_bpw <= bpw <= reachable.highest_bpw:
        limits = "; ".join(reachable.limits)
        raise InfeasibleBudgetError(
            f"--bpw {bpw:g} cannot be reached: with these candidate types the text model takes "
            f"{reachable.lowest_bpw:.3f} to {reachable.highest_bpw:.3f} bits per weight ({limits})"
        )
    return reachable


def _limits(tensors: Sequence[SourceTensor], types: CandidateTypes, weights: int) -> list[str]:
    kept = sum(tensor.n_weights for tensor in tensors if tensor.role is Role.KEEP)
    dense = sum(tensor.n_weights for tensor in tensors if tensor.role not in (Role.KEEP, Role.EXPERT))
    limits = [
        f"experts hold {100 * (weights - kept - dense) / weights:.1f} % of the weights, as {_names(types.expert)}",
        f"attention, embedding and output {100 * dense / weights:.1f} %, as {_names(types.dense)}",
        f"routers and norms {100 * kept / weights:.2f} %, as F32",
    ]
    for role, offered in ((Role.EXPERT, types.expert), (None, types.dense)):
        matching = [t for t in tensors if (t.role is role if role else t.role not in (Role.KEEP, Role.EXPERT))]
        for width in sorted({t.row_width for t in matching}):
            misfits = [quant_type.name for quant_type in offered if not quant_type.fits(width)]
            if misfits:
                count = sum(t.row_width == width for t in matching)
                limit = f"rows of {width} in {count} tensors do not fit {', '.join(misfits)}"
                if len(misfits) == len(offered) and FALLBACK.fits(width):
                    limit += f" and take {FALLBACK.name}; IQ4_NL, Q4_0 and Q5_0 would fit"
                limits.append(limit)
    return limits


def _names(types: Sequence[object]) -> str:
    return "/".join(getattr(quant_type, "name", str(quant_type)) for quant_type in types)
