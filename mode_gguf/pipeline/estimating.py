"""The estimate of a conversion: sizes and resources of all stages, from shapes alone."""

import os
from dataclasses import dataclass

from mode_gguf.allocation.budget import ReachableSizes
from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.estimate.free_resources import FreeResources, free_resources
from mode_gguf.estimate.machine import measure_machine
from mode_gguf.estimate.stage_estimates import (
    ModelSizes,
    StageEstimate,
    TokenCounts,
    Workload,
    stage_estimates,
)
from mode_gguf.gpu_memory.breakdown import MemoryBreakdown
from mode_gguf.pipeline.gpu_budget import breakdown_of_reach
from mode_gguf.pipeline.run import Run
from mode_gguf.pipeline.samples_key import calibration_samples
from mode_gguf.pipeline.settings import PlanSettings, Target
from mode_gguf.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ConversionEstimate:
    """Estimate of a conversion.

    Attributes:
        model_bytes: of the text model's file.
        layers, experts: layers with routed experts, and experts of the largest.
        memory: breakdown of the GPU's memory, if that is the budget.
    """

    model_name: str
    family: str
    reach: ReachableSizes
    model_bytes: int
    n_weights: int
    expert_weights: int
    layers: int
    experts: int
    stages: tuple[StageEstimate, ...]
    free: FreeResources
    memory: MemoryBreakdown | None = None


def estimate(
    run: Run, recipe: Recipe, settings: PlanSettings, target: Target, *, measured: bool = False
) -> ConversionEstimate:
    """Estimate of a conversion, before anything is computed.

    Args:
        recipe: resolved for the model.
        settings, target: of its plan.
        measured: look at the samples and at this machine, for closer estimates and for times; a second or two.

    Raises:
        InputError: the checkpoint cannot be converted, or with `measured` a sample not be read.
    """
    checkpoint, tensors = run.checkpoint, text_tensors(run.checkpoint)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    reach = target.reach
    model_bytes = reach.budget + (target.overhead if settings.budget.kind == "size" else 0)
    return ConversionEstimate(
        model_name=checkpoint.name,
        family=find_family(checkpoint).hf_class,
        reach=reach,
        model_bytes=model_bytes,
        n_weights=sum(tensor.n_weights for tensor in tensors),
        expert_weights=sum(tensor.n_weights for tensor in experts),
        layers=len({tensor.layer for tensor in experts}),
        experts=max(tensor.n_experts for tensor in experts),
        stages=tuple(_stages(run, recipe, settings, model_bytes, measured=measured)),
        free=free_resources(run.folder),
        memory=breakdown_of_reach(checkpoint, settings.budget, target.types, reach),
    )


def _stages(
    run: Run, recipe: Recipe, settings: PlanSettings, model_bytes: int, *, measured: bool
) -> list[StageEstimate]:
    sizes, calibration = ModelSizes.of(run.checkpoint), recipe.calibration
    counts, machine = TokenCounts.at_most(calibration, sizes), None
    without_model = calibration.from_imatrix is not None
    if without_model:
        counts = TokenCounts(0, 0, 0)
    elif measured:
        counts = TokenCounts.of(calibration_samples(calibration), sizes)
    if measured:
        machine = measure_machine("cpu" if without_model else recipe.compute.device, run.checkpoint.files)
    workload = Workload(
        counts=counts,
        model_bytes=model_bytes,
        hidden_bytes=recipe.compute.hidden_memory,
        expert_types=len(settings.types.expert),
        dense_types=len(settings.types.dense),
        without_model=without_model,
        feedback=settings.rounding == "feedback",
        validate=recipe.validation.validate,
    )
    return stage_estimates(sizes, workload, recipe.compute.threads or os.cpu_count() or 1, machine)
