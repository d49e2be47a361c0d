"""The frontier: predicted damage at every size, from measurements that are there already."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.costs import CostModel, MeasuredCosts, tensor_units
from mode_gguf.allocation.planner import FIXED_DENSE, Problem, uniform_dense, uniform_type
from mode_gguf.allocation.presets import Preset
from mode_gguf.allocation.units import CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.artifacts import Record
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

KL_ANSWERS = ("text", "image")
"""Kinds of answers whose KL, in nats per scored position, Fisher sensitivity predicts."""

COST = "cost"
"""The one prediction of other sensitivities: a number of no unit that orders plans."""


class FrontierPoint(Record):
    """The plan of least predicted damage at a size, or a uniform plan.

    Attributes:
        uniform: the type of all experts of a uniform plan; attention, embedding and output take it too, but not below
            Q4_K. None for a plan that was solved for.
        size_bytes: of all tensors of the text model.
        predicted: one number for each of the frontier's `answers`.
        expert_shares: type to its share of the experts' bytes.
        gap: relative optimality gap; None for a uniform one.
    """

    uniform: str | None = None
    size_bytes: int
    bpw: float
    predicted: tuple[float, ...]
    expert_shares: dict[str, float]
    gap: float | None = None


class Frontier(Record):
    """frontier.json: points from the smallest plan that the candidates allow to the largest.

    Attributes:
        answers: `text` and `image`, predicted KL in nats per scored position, or `cost` alone.
        lowest_bytes, highest_bytes: sizes when every tensor takes its smallest or its largest candidate.
    """

    model: str
    preset: str
    sensitivity: str
    answers: tuple[str, ...]
    lowest_bytes: int
    highest_bytes: int
    points: list[FrontierPoint]
    uniform: list[FrontierPoint]


def frontier(
    model: str,
    tensors: Sequence[SourceTensor],
    measured: MeasuredCosts,
    *,
    preset: Preset,
    types: CandidateTypes,
    points: int = 20,
) -> Frontier:
    """Solve for `points` (two or more) budgets, evenly spaced between the smallest and the largest plan.

    Budgets that cannot be shared out among layers, where `preset` gives each one of its own, have no point.
    """
    answers = predicted_answers(preset)
    offered = [types] if preset.dense == "measured" else [replace(types, dense=(t,)) for t in FIXED_DENSE]
    sizes = [[tensor_bytes(t, c) for choice in offered for c in choice.of(t)] for t in tensors]
    lowest, highest = sum(map(min, sizes)), sum(map(max, sizes))
    predictor = _Predictor.of(tensors, measured, preset, types, answers)
    solved = []
    for budget in np.linspace(lowest, highest, points).astype(np.int64).tolist():
        size = Budget(kind="size", value=budget)
        problem = Problem.of(tensors, measured, budget=size, types=types, preset=preset)
        units = problem.tensor_units()
        try:
            solution = problem.solve(units)
        except InfeasibleBudgetError:
            if preset.scope == "model":
                raise
            continue
        chosen = {unit.name: choice.quant_type for unit, choice in zip(units, solution.choices, strict=True)}
        solved.append(predictor.point(chosen).model_copy(update={"gap": solution.gap}))
    return Frontier(
        model=model,
        preset=preset.name,
        sensitivity=preset.method,
        answers=tuple(answers),
        lowest_bytes=lowest,
        highest_bytes=highest,
        points=solved,
        uniform=[
            predictor.point(_uniform(tensors, quant_type)).model_copy(update={"uniform": quant_type.name})
            for quant_type in _uniform_types(types, measured, preset)
        ],
    )


def predicted_answers(preset: Preset) -> Mapping[str, CostModel]:
    """Predictions by name, each with the costs that it is made from."""
    if preset.costs.combination != "sensitivity" or not (preset.method == "fisher" or preset.unit_kl):
        return {COST: preset.costs}
    weights = ((1.0, 0.0), (0.0, 1.0))
    return {name: replace(preset.costs, answer_weights=own) for name, own in zip(KL_ANSWERS, weights, strict=True)}


def _uniform_types(types: CandidateTypes, measured: MeasuredCosts, preset: Preset) -> Iterator[QuantType]:
    """Candidates of experts for which everything else was measured, too, if it is at all."""
    for quant_type in sorted(types.expert, key=lambda candidate: candidate.bits_per_weight):
        if preset.dense == "fixed" or uniform_dense(quant_type).name in measured.dense_types:
            yield quant_type


def _uniform(tensors: Sequence[SourceTensor], quant_type: QuantType) -> dict[str, QuantType]:
    """Types of all tensors with a choice, as in `planner.uniform_plan`."""
    return {tensor.name: uniform_type(tensor, quant_type) for tensor in tensors if tensor.role is not Role.KEEP}


@dataclass(frozen=True, slots=True)
class _Predictor:
    """Sizes and predictions of any choice of types.

    `costs` are by tensor and type, one per answer. A type without any is one that the tensor has no choice about.
    """

    tensors: Sequence[SourceTensor]
    costs: Mapping[str, Mapping[str, np.ndarray]]
    n_answers: int

    @classmethod
    def of(
        cls,
        tensors: Sequence[SourceTensor],
        measured: MeasuredCosts,
        preset: Preset,
        types: CandidateTypes,
        answers: Mapping[str, CostModel],
    ) -> "_Predictor":
        dense = types.dense
        if preset.dense == "fixed":
            dense = FIXED_DENSE[:1]
        else:
            needed = {uniform_dense(quant_type) for quant_type in _uniform_types(types, measured, preset)}
            dense = (*dense, *sorted(needed - set(dense), key=lambda quant_type: quant_type.name))
        costs: dict[str, dict[str, np.ndarray]] = {}
        for index, model in enumerate(answers.values()):
            for unit in tensor_units(tensors, CandidateTypes(types.expert, dense), measured, model):
                for candidate in unit.candidates:
                    per_answer = costs.setdefault(unit.name, {})
                    per_answer.setdefault(candidate.quant_type.name, np.zeros(len(answers)))[index] = candidate.cost
        return cls(tensors, costs, len(answers))

    def point(self, chosen: Mapping[str, QuantType]) -> FrontierPoint:
        """Size and prediction of a choice for all tensors but those that stay F32."""
        predicted = np.zeros(self.n_answers)
        size_bytes, experts = 0, dict[str, int]()
        for tensor in self.tensors:
            quant_type = chosen.get(tensor.name, QUANT_TYPES["F32"])
            size = tensor_bytes(tensor, quant_type)
            size_bytes += size
            predicted += self.costs.get(tensor.name, {}).get(quant_type.name, 0.0)
            if tensor.role is Role.EXPERT:
                experts[quant_type.name] = experts.get(quant_type.name, 0) + size
        by_bits = sorted(experts, key=lambda name: QUANT_TYPES[name].bits_per_weight)
        return FrontierPoint(
            size_bytes=size_bytes,
            bpw=8 * size_bytes / sum(tensor.n_weights for tensor in self.tensors),
            predicted=tuple(predicted.tolist()),
            expert_shares={name: experts[name] / sum(experts.values()) for name in by_bits},
        )
