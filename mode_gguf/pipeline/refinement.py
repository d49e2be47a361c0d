"""Refinement of a plan by measured KL: units' costs together, which costs measured one at a time do not show.

Around a plan, every unit is moved to the next smaller and the next larger of its types and the whole model's KL is
measured, as many moves in one pass over the layers as hidden states may be kept. Those marginal costs make a new
integer programme, in which only a few units may leave their type at once, because marginal costs do not add up either.
Its plan is measured and taken if its KL has really fallen; if not, fewer units may move. Then the next round starts
from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mode_gguf.allocation.plan import RefinementTrial
from mode_gguf.allocation.solver import solve
from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import UsageError
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.types import QuantType

if TYPE_CHECKING:
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.unit_kl import KlModel

DEFAULT_ROUNDS = 3

MOVING_SHARE = 0.5
"""Share of the units that may change their type in the first round."""

DEFAULT_PASS_BYTES = 32 << 30
"""Limit of the hidden states of one pass over all its moves, in bytes; on disk beyond what memory is allowed."""

_BISECTIONS = 24

_TILT = 0.01


class Measure(Protocol):
    """Measurement of a plan, and of the plans that single moves around it make."""

    def __call__(
        self, types: Mapping[str, QuantType], moves: Sequence[tuple[str, QuantType]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """KL by kind of answer, (A,), of the plan that gives every unit its type; and (moves, A), of the same plan with
        one unit in another type."""
        ...


@dataclass(frozen=True, slots=True)
class RefinementResult:
    """The best plan that was found, one candidate per unit, and all that were measured, the first one first."""

    choices: tuple[Candidate, ...]
    history: tuple[RefinementTrial, ...]


def refine(
    units: Sequence[AllocationUnit],
    first: Sequence[Candidate],
    budget: int,
    measure: Measure,
    *,
    answer_weights: Sequence[float] = (1.0, 1.0),
    rounds: int = DEFAULT_ROUNDS,
    max_moves: int | None = None,
) -> RefinementResult:
    """Improve the plan `first`, one of each unit's candidates, within `budget` bytes.

    A unit moves by one of its types (in order of size) per round at most. As deterministic as `measure` is.

    Args:
        units: as for `allocation.solver.solve`; their candidates' costs are not looked at.
        answer_weights: what the kinds of answers count in the objective.
        rounds: how often all moves are measured at most; it ends before that where nothing improves any more.
        max_moves: units that may move at once in the first round; None for half of them.

    Raises:
        UsageError: the first plan takes more than the budget.
    """
    current = tuple(first)
    if _size(current) > budget:
        raise UsageError(f"the plan to refine takes {_size(current)} bytes, more than its budget of {budget}")
    limit = max_moves if max_moves is not None else max(1, int(MOVING_SHARE * len(units)))
    weights = np.asarray(answer_weights, np.float64)
    history: list[RefinementTrial] = []
    for _ in range(rounds):
        offered = [_neighbours(unit, choice) for unit, choice in zip(units, current, strict=True)]
        moves = [(u, c) for u, candidates in enumerate(offered) for c in candidates if c != current[u]]
        kl, moved_kl = measure(_types(units, current), [(units[u].name, c.quant_type) for u, c in moves])
        if not history:
            history.append(_trial(kl, current, (), accepted=True))
        best = float(weights @ kl)
        marginal = {
            (u, c.quant_type): float(weights @ found) - best for (u, c), found in zip(moves, moved_kl, strict=True)
        }
        accepted = False
        while limit >= 1 and not accepted:
            proposed = _proposal(units, current, offered, marginal, budget, limit)
            moved = _moved(units, current, proposed)
            if not moved:
                break
            kl, _ = measure(_types(units, proposed), [])
            accepted = float(weights @ kl) < best
            history.append(_trial(kl, proposed, moved, accepted=accepted))
            if not accepted:
                limit = len(moved) // 2
        if not accepted:
            break
        current = proposed
    return RefinementResult(current, tuple(history))


def measure_plans(
    model: "KlModel",
    settings: "KlSettings",
    tensors: Sequence[SourceTensor],
    progress: Progress = silent,
    *,
    pass_bytes: int = DEFAULT_PASS_BYTES,
) -> Measure:
    """Measures plans of tensor units (`allocation.costs.tensor_units`) on the model's samples.

    Args:
        pass_bytes: of hidden states that one pass may keep; moves beyond that take another pass, which packs the plan's
            weights again.
    """
    from mode_gguf.forward.denormals import denormals_flushed
    from mode_gguf.importance.quantized_kl import quantized_kl
    from mode_gguf.importance.variants import Variant

    n_experts = {tensor.name: tensor.n_experts for tensor in tensors}
    width = next(tensor.row_width for tensor in tensors if tensor.role is Role.EMBEDDING)
    move_bytes = 4 * width * sum(one.input_ids.numel() for one in model.inputs)
    per_pass = max(1, pass_bytes // move_bytes)

    @denormals_flushed()
    def measure(
        types: Mapping[str, QuantType], moves: Sequence[tuple[str, QuantType]]
    ) -> tuple[np.ndarray, np.ndarray]:
        base = {name: (quant_type,) * n_experts[name] for name, quant_type in types.items()}
        variants = [
            Variant(f"{name} in {quant_type.name}", {name: (quant_type,) * n_experts[name]})
            for name, quant_type in moves
        ]
        passes = [variants[start : start + per_pass] for start in range(0, len(variants), per_pass)] or [[]]
        found = []
        for number, together in enumerate(passes, start=1):
            description = f"measuring {len(moves)} moves" if moves else "measuring a plan"
            if len(passes) > 1:
                description += f", pass {number} of {len(passes)}"
            found.append(
                quantized_kl(
                    model.streamed,
                    model.inputs,
                    together,
                    settings,
                    base=base,
                    description=description,
                    progress=progress,
                )
            )
        return found[0].base, np.concatenate([one.variants for one in found])

    return measure


def _neighbours(unit: AllocationUnit, choice: Candidate) -> list[Candidate]:
    """The choice, the next smaller candidate and the next larger one, as far as there are."""
    by_size = sorted(unit.candidates, key=lambda candidate: candidate.size_bytes)
    at = by_size.index(choice)
    return by_size[max(0, at - 1) : at + 2]


def _proposal(
    units: Sequence[AllocationUnit],
    current: Sequence[Candidate],
    offered: Sequence[Sequence[Candidate]],
    marginal: Mapping[tuple[int, QuantType], float],
    budget: int,
    limit: int,
) -> tuple[Candidate, ...]:
    """The plan of least marginal cost in which at most `limit` units move.

    Every move is charged a toll, the lowest one (by bisection) at which so few units move: the Lagrangian of the limit,
    which needs nothing from the solver. Tolls rise a little from unit to unit, so that equal ones part.
    """
    tilt = 1 + _TILT * np.arange(len(units)) / len(units)

    def solved(multiplier: float) -> tuple[Candidate, ...]:
        problem = []
        for u, (unit, candidates) in enumerate(zip(units, offered, strict=True)):
            costs = [0.0 if c == current[u] else marginal[u, c.quant_type] + multiplier * tilt[u] for c in candidates]
            shifted = [cost - min(costs) for cost in costs]  # the solver wants none below zero
            problem.append(
                replace(
                    unit,
                    candidates=tuple(replace(c, cost=cost) for c, cost in zip(candidates, shifted, strict=True)),
                )
            )
        return tuple(
            next(c for c in candidates if c.quant_type == chosen.quant_type)
            for chosen, candidates in zip(solve(problem, budget).choices, offered, strict=True)
        )

    proposed = solved(0.0)
    if len(_moved(units, current, proposed)) <= limit:
        return proposed
    low, high, proposed = 0.0, 2 * sum(map(abs, marginal.values())), tuple(current)
    for _ in range(_BISECTIONS):
        multiplier = (low + high) / 2
        choices = solved(multiplier)
        if len(_moved(units, current, choices)) > limit:
            low = multiplier
        else:
            high, proposed = multiplier, choices
    return proposed


def _moved(units: Sequence[AllocationUnit], old: Sequence[Candidate], new: Sequence[Candidate]) -> tuple[str, ...]:
    return tuple(unit.name for unit, before, after in zip(units, old, new, strict=True) if after != before)


def _types(units: Sequence[AllocationUnit], choices: Sequence[Candidate]) -> dict[str, QuantType]:
    return {unit.name: choice.quant_type for unit, choice in zip(units, choices, strict=True)}


def _size(choices: Sequence[Candidate]) -> int:
    return sum(choice.size_bytes for choice in choices)


def _trial(kl: np.ndarray, choices: Sequence[Candidate], moved: tuple[str, ...], *, accepted: bool) -> RefinementTrial:
    return RefinementTrial(kl=tuple(map(float, kl)), size_bytes=_size(choices), moved=moved, accepted=accepted)
