"""GPU memory budgets: the bytes left for tensors, and the breakdown of the whole memory."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from mode_gguf.allocation.budget import Budget, ReachableSizes, effective_types, system_memory_bytes
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.planner import FIXED_DENSE, reachable_candidates
from mode_gguf.allocation.presets import Preset
from mode_gguf.allocation.units import CandidateTypes, tensor_bytes
from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.export.projector import projector_bytes
from mode_gguf.export.text_model import metadata_bytes
from mode_gguf.gpu_memory.breakdown import MemoryBreakdown, MemoryLine, ModelShape, memory_lines
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.quantization.expert_groups import layer_groups
from mode_gguf.vocabulary import Granularity

_STEP = 256
"""Step between llama.cpp's context sizes, in tokens."""


def reachable_sizes(
    checkpoint: Checkpoint,
    budget: Budget,
    types: CandidateTypes,
    preset: Preset,
    granularity: Granularity = "tensor",
) -> tuple[CandidateTypes, ReachableSizes, int]:
    """The candidates that preset and budget leave, what they reach, and what the budget pays for beside tensors.

    Raises:
        InfeasibleBudgetError: the budget is out of reach; where it is a GPU's memory, the message says what fits.
        UsageError: the memory of this model cannot be computed.
    """
    tensors = text_tensors(checkpoint)
    groups = len(types.expert) if granularity == "expert" else 1
    overhead = _overhead(checkpoint, budget, groups)
    try:
        return *reachable_candidates(tensors, types, budget, preset, overhead), overhead
    except InfeasibleBudgetError:
        if budget.fit is None:
            raise
        smallest = replace(types, dense=FIXED_DENSE[-1:]) if preset.dense == "fixed" else types
        smallest = effective_types(smallest, budget)
        raise InfeasibleBudgetError(
            _infeasible_message(checkpoint, tensors, budget, budget.fit, smallest, groups)
        ) from None


def breakdown_of_reach(
    checkpoint: Checkpoint, budget: Budget, types: CandidateTypes, reach: ReachableSizes
) -> MemoryBreakdown | None:
    """Memory breakdown of a text model of the budget's size; None for a budget that is no GPU memory."""
    tensors = text_tensors(checkpoint)
    embedding = system_memory_bytes(tensors, types)
    return _breakdown(checkpoint, budget, reach.budget - embedding, embedding, 8 * reach.budget / reach.n_weights)


def with_breakdown(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan with its memory breakdown, if its budget is a GPU's memory."""
    if plan.budget is None or plan.budget.fit is None:
        return plan
    tensors = text_tensors(checkpoint)
    embedding = 0
    if any(tensor.role is Role.OUTPUT for tensor in tensors):
        names = {tensor.name for tensor in tensors if tensor.role is Role.EMBEDDING}
        embedding = sum(tensor.size_bytes for tensor in plan.tensors if tensor.name in names)
    groups = max((len(found) for found in layer_groups(plan.experts).values()), default=1)
    breakdown = _breakdown(checkpoint, plan.budget, plan.size_bytes - embedding, embedding, plan.bpw, groups)
    return plan.model_copy(update={"memory": breakdown})


def _breakdown(
    checkpoint: Checkpoint, budget: Budget, on_gpu: int, embedding: int, bpw: float, groups: int = 1
) -> MemoryBreakdown | None:
    if budget.fit is None:
        return None
    others = memory_lines(model_shape(checkpoint, budget.fit), budget.fit, groups)
    text = MemoryLine(name="text model", bytes=on_gpu, what=f"{bpw:.3f} bits per weight")
    lines = [*(line for line in others if line.on_gpu), text, *(line for line in others if not line.on_gpu)]
    if embedding:
        lines.append(
            MemoryLine(name="token embedding", bytes=embedding, what="looked up in system memory", on_gpu=False)
        )
    return MemoryBreakdown(memory=int(budget.value), settings=budget.fit, lines=tuple(lines))


def _overhead(checkpoint: Checkpoint, budget: Budget, groups: int) -> int:
    """Bytes that the budget pays for beside tensors."""
    if budget.fit is not None:
        return _claimed(checkpoint, budget.fit, groups)
    return metadata_bytes(checkpoint, groups) if budget.kind == "size" else 0


def _claimed(checkpoint: Checkpoint, fit: FitSettings, groups: int) -> int:
    return sum(line.bytes for line in memory_lines(model_shape(checkpoint, fit), fit, groups) if line.on_gpu)


def model_shape(checkpoint: Checkpoint, fit: FitSettings) -> ModelShape:
    """The model shape that memory depends on, tensors' types aside."""
    family, tensors = find_family(checkpoint), text_tensors(checkpoint)
    return ModelShape.of(
        family.memory_graphs,
        family.gguf_arch,
        family.text_metadata(checkpoint),
        family.projector_metadata(checkpoint),
        vocabulary=next(tensor.shape[0] for tensor in tensors if tensor.role is Role.EMBEDDING),
        text_tensors=len(tensors),
        projector_bytes=projector_bytes(checkpoint, fit.projector_type),
    )


def _infeasible_message(
    checkpoint: Checkpoint,
    tensors: Sequence[SourceTensor],
    budget: Budget,
    fit: FitSettings,
    types: CandidateTypes,
    groups: int,
) -> str:
    """Error message with settings that fit: this context in more memory, or a smaller one in this."""
    claimed = _claimed(checkpoint, fit, groups)
    smallest = sum(min(tensor_bytes(tensor, candidate) for candidate in types.of(tensor)) for tensor in tensors)
    least = smallest - system_memory_bytes(tensors, types)
    bpw = 8 * smallest / sum(tensor.n_weights for tensor in tensors)
    left = max(0, int(budget.value) - claimed)
    message = (
        f"{budget} cannot be reached: everything else takes {claimed / 2**20:,.0f} MiB, which leaves "
        f"{left / 2**20:,.0f} MiB for the text model, and at its smallest ({bpw:.2f} bits per weight) it takes "
        f"{least / 2**20:,.0f} MiB on the GPU; this context needs --fit {ceil((least + claimed) / 2**20)}MiB"
    )
    context = _largest_context(checkpoint, budget, fit, least, groups)
    if context is None:
        return message
    return f"{message}, and in this memory the largest is --ctx {context}"


def _largest_context(checkpoint: Checkpoint, budget: Budget, fit: FitSettings, least: int, groups: int) -> int | None:
    """The largest context below the one asked for that fits with the smallest types; None if none does."""
    shape = model_shape(checkpoint, fit)

    def fits(steps: int) -> bool:
        smaller = fit.model_copy(update={"context": steps * _STEP * fit.parallel})
        claimed = sum(line.bytes for line in memory_lines(shape, smaller, groups) if line.on_gpu)
        return claimed + least <= budget.value

    low, high = 0, -(-fit.context // (_STEP * fit.parallel))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * _STEP * fit.parallel if low else None
