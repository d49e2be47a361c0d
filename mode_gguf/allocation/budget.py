"""Budgets as bytes of tensors, from bpw, file size or GPU memory; and the range of budgets that can be reached."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from mode_gguf.allocation.units import CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.artifacts import Record
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.quantization.types import QuantType


class Budget(Record):
    """A size budget for the text model.

    `bpw`: bits per weight of the whole text model; `size`: bytes of its file; `expert-bpw`: bits per weight of the
    routed experts alone, everything else taking the largest of its candidate types; `fit`: bytes of the GPU that it is
    going to be run on, as `fit` says.
    """

    kind: Literal["bpw", "size", "expert-bpw", "fit"] = "bpw"
    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    fit: FitSettings | None = None

    def __str__(self) -> str:
        match self.kind:
            case "size":
                return f"--size {self.value / 2**20:.2f}MiB"
            case "fit":
                return f"--fit {self.value / 2**20:.2f}MiB {self.fit}"
        return f"--{self.kind} {self.value:g}"


@dataclass(frozen=True, slots=True)
class ReachableSizes:
    """Bytes of all tensors when each takes its smallest or largest candidate, and the budget's in between."""

    lowest: int
    highest: int
    budget: int
    n_weights: int
    limits: tuple[str, ...]
    """Reasons for the ends of the range, in words: fixed tensors, rows that fit no candidate's block."""

    @property
    def lowest_bpw(self) -> float:
        return 8 * self.lowest / self.n_weights

    @property
    def highest_bpw(self) -> float:
        return 8 * self.highest / self.n_weights


def effective_types(types: CandidateTypes, budget: Budget) -> CandidateTypes:
    """The candidates under this budget: one on experts alone leaves everything else at its largest."""
    if budget.kind != "expert-bpw":
        return types
    return replace(types, dense=(max(types.dense, key=lambda quant_type: quant_type.bits_per_weight),))


def budget_bytes(tensors: Sequence[SourceTensor], types: CandidateTypes, budget: Budget, overhead: int = 0) -> int:
    """Bytes that `budget` allows for all tensors of the text model together.

    Args:
        types: as `effective_types` gives them.
        overhead: what else has to be paid for: by a `size` budget, the file's metadata; by a `fit` budget, everything
            else on the GPU.
    """
    match budget.kind:
        case "bpw":
            return int(budget.value * sum(tensor.n_weights for tensor in tensors) / 8)
        case "size":
            return int(budget.value) - overhead
        case "fit":
            left = int(budget.value) - overhead + system_memory_bytes(tensors, types)
            return min(left, sum(max(_sizes(t, types)) for t in tensors))
        case "expert-bpw":
            experts = sum(tensor.n_weights for tensor in tensors if tensor.role is Role.EXPERT)
            others = (tensor_bytes(t, types.of(t)[-1]) for t in tensors if t.role is not Role.EXPERT)
            return int(budget.value * experts / 8) + sum(others)


def system_memory_bytes(tensors: Sequence[SourceTensor], types: CandidateTypes) -> int:
    """Least bytes of the token embedding, which llama.cpp keeps there; 0 where it is the output head, too."""
    if all(tensor.role is not Role.OUTPUT for tensor in tensors):
        return 0
    return sum(min(_sizes(tensor, types)) for tensor in tensors if tensor.role is Role.EMBEDDING)


def check_reachable(
    tensors: Sequence[SourceTensor], types: CandidateTypes, budget: Budget, overhead: int = 0
) -> ReachableSizes:
    """The sizes that the candidates can reach, once the budget is known to lie among them; needs shapes only.

    Raises:
        InfeasibleBudgetError: it does not; the message gives the range and what limits it.
    """
    types = effective_types(types, budget)
    sizes = [_sizes(tensor, types) for tensor in tensors]
    n_weights = sum(tensor.n_weights for tensor in tensors)
    reach = ReachableSizes(
        lowest=sum(map(min, sizes)),
        highest=sum(map(max, sizes)),
        budget=budget_bytes(tensors, types, budget, overhead),
        n_weights=n_weights,
        limits=tuple(_limits(tensors, types, n_weights)),
    )
    if not reach.lowest <= reach.budget <= reach.highest:
        raise InfeasibleBudgetError(
            f"{budget} cannot be reached: with these candidate types the text model takes "
            f"{_range(reach, budget, overhead)} "
            f"({'; '.join(reach.limits)})"
        )
    return reach


def _sizes(tensor: SourceTensor, types: CandidateTypes) -> list[int]:
    return [tensor_bytes(tensor, candidate) for candidate in types.of(tensor)]


def _range(reach: ReachableSizes, budget: Budget, overhead: int) -> str:
    if budget.kind in ("size", "fit"):
        return f"{(reach.lowest + overhead) / 2**20:.2f} to {(reach.highest + overhead) / 2**20:.2f} MiB"
    return f"{reach.lowest_bpw:.3f} to {reach.highest_bpw:.3f} bits per weight"


def _limits(tensors: Sequence[SourceTensor], types: CandidateTypes, weights: int) -> list[str]:
    kept = sum(tensor.n_weights for tensor in tensors if tensor.role is Role.KEEP)
    absorbed = [tensor for tensor in tensors if tensor.role is Role.ABSORBED]
    in_absorbed = sum(tensor.n_weights for tensor in absorbed)
    experts = sum(tensor.n_weights for tensor in tensors if tensor.role is Role.EXPERT)
    dense = weights - kept - in_absorbed - experts
    limits = [
        f"experts hold {100 * experts / weights:.1f} % of the weights, as {_names(types.expert)}",
        f"attention, embedding and output {100 * dense / weights:.1f} %, as {_names(types.dense)}",
        f"routers and norms {100 * kept / weights:.2f} %, as F32",
        *(
            f"absorbed matrices of latent attention {100 * in_absorbed / weights:.2f} %, as {name}"
            for name in sorted({types.of(tensor)[0].name for tensor in absorbed})
        ),
        *(f"{role} not below {floor.name}" for role, floor in types.floors.items()),
    ]
    for is_expert, offered in ((True, types.expert), (False, types.dense)):
        matching = [t for t in tensors if t.is_measured and (t.role is Role.EXPERT) == is_expert]
        for width in sorted({t.row_width for t in matching}):
            misfits = [quant_type.name for quant_type in offered if not quant_type.fits(width)]
            if misfits:
                wide = [t for t in matching if t.row_width == width]
                share = 100 * sum(t.n_weights for t in wide) / weights
                taken = dict.fromkeys(quant_type for t in wide for quant_type in types.of(t))
                limits.append(
                    f"rows of {width} in {len(wide)} tensors ({share:.1f} %) do not fit {', '.join(misfits)} and take "
                    f"{_names(sorted(taken, key=lambda quant_type: quant_type.bits_per_weight))}"
                )
    return limits


def _names(types: Sequence[QuantType]) -> str:
    return "/".join(quant_type.name for quant_type in types)
