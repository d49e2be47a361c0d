"""Settings of stages, resolved from a recipe for one model and one work folder."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mode_gguf.allocation.budget import Budget, ReachableSizes
from mode_gguf.allocation.presets import Preset, preset_of
from mode_gguf.allocation.units import UNMEASURED, CandidateTypes, candidate_types
from mode_gguf.architectures import projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.artifacts import read_metadata
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.options import (
    DEFAULT_DENSE_TYPES,
    DEFAULT_EXPERT_TYPES,
    GROUP_EXPERT_TYPES,
    BudgetOptions,
    CalibrationOptions,
    FitOptions,
    Packing,
    SensitivityOptions,
)
from mode_gguf.pipeline.gpu_budget import reachable_sizes
from mode_gguf.plain_text import shell_line
from mode_gguf.recipe import Recipe
from mode_gguf.vocabulary import Granularity, Method, Rounding
from mode_gguf.workfolder import WorkFolder

DEFAULT_BPW: Final = 3.0
MODEL_FREE_METHOD: Final[Method] = "imatrix-error"
"""Sensitivity method that runs no model."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Settings of a plan.

    Attributes:
        granularity: what shares a type; stock llama.cpp cannot load a file with a type per expert.
        rounding: that the file will have; the measurements, which are to nearest, are corrected for it.
        refine: rounds in which the plan is measured together with its neighbours and improved.
        measured_samples: calibration samples that `refine` measures on.
    """

    budget: Budget
    preset: Preset
    types: CandidateTypes
    granularity: Granularity = "tensor"
    rounding: Rounding = "nearest"
    refine: int = 0
    measured_samples: int = SensitivityOptions.measured_samples

    @classmethod
    def of(cls, recipe: Recipe, types: CandidateTypes) -> "PlanSettings":
        """The settings that a recipe asks for.

        Raises:
            UsageError: options that do not go together.
        """
        options = recipe.plan
        if options.refine and options.granularity == "expert":
            raise UsageError("plan.refine improves a type per tensor; leave it out with --granularity expert")
        if options.uniform is not None:
            raise UsageError(
                f"plan.uniform {options.uniform} leaves nothing to choose: make such a plan with `mode-gguf plan "
                f"--uniform {options.uniform}` and pack it with `mode-gguf export`"
            )
        return cls(
            budget=budget_of(options.budget, recipe.export.mmproj_type),
            preset=preset_of(recipe),
            types=types,
            granularity=options.granularity,
            rounding=options.rounding or recipe.sensitivity.packing.default_rounding,
            refine=options.refine,
            measured_samples=recipe.sensitivity.measured_samples,
        )

    def target(self, checkpoint: Checkpoint) -> "Target":
        """The sizes that the budget leaves for tensors of this model.

        Raises:
            InfeasibleBudgetError: the budget is out of reach; where it is a GPU's memory, the message says what fits.
            UsageError: the memory of this model cannot be computed.
        """
        return Target(*reachable_sizes(checkpoint, self.budget, self.types, self.preset, self.granularity))


@dataclass(frozen=True, slots=True)
class Target:
    """The sizes that a budget leaves.

    Attributes:
        types: candidates as budget and preset leave them.
        reach: bytes of all tensors that they reach, and the budget's.
        overhead: bytes that the budget pays for beside tensors.
    """

    types: CandidateTypes
    reach: ReachableSizes
    overhead: int


def budget_of(options: BudgetOptions, projector_type: str) -> Budget:
    """The budget from the four ways of giving one.

    Raises:
        UsageError: more than one, a GPU's memory without its context, or what shares that memory without it.
    """
    ways = {"--bpw": options.bpw, "--size": options.size, "expert_bpw": options.expert_bpw, "--fit": options.fit}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different budgets: give one of them")
    if options.fit is not None:
        if options.gpu.context is None:
            raise UsageError("--fit needs to know how long the context is: give --ctx, such as --ctx 32768")
        return Budget(kind="fit", value=options.fit, fit=FitSettings.of(options.gpu, projector_type))
    for name, flag in (("context", "--ctx"), ("parallel", ""), ("kv_type", ""), ("image_tokens", ""), ("reserve", "")):
        if getattr(options.gpu, name) != getattr(FitOptions, name):
            option = flag or f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} goes with --fit, the memory of the GPU, such as --fit 24GiB")
    if options.size is not None:
        return Budget(kind="size", value=options.size)
    if options.expert_bpw is not None:
        return Budget(kind="expert-bpw", value=options.expert_bpw)
    return Budget(kind="bpw", value=DEFAULT_BPW if options.bpw is None else options.bpw)


def candidates_of(recipe: Recipe, folder: WorkFolder) -> CandidateTypes:
    """The candidate types that a recipe asks for; defaults give way to what was measured in the folder, if it is more.

    So a plan with a type per tensor follows one with a type per expert without measuring again.

    Raises:
        UsageError: an unknown type or role, or an empty list.
        MissingResourceError: libggml packs one of them, and cannot be used.
    """
    options = recipe.sensitivity
    expert: tuple[str, ...] = GROUP_EXPERT_TYPES if recipe.plan.granularity == "expert" else DEFAULT_EXPERT_TYPES
    dense: tuple[str, ...] = DEFAULT_DENSE_TYPES
    with suppress(InputError):  # nothing was measured there
        measured_expert, measured_dense = _measured_types(folder)
        expert = measured_expert if set(measured_expert) >= set(expert) else expert
        dense = measured_dense if set(measured_dense) >= set(dense) else dense
    return candidate_types(options.types or expert, options.dense_types or dense, recipe.plan.floors)


def with_types(recipe: Recipe, types: CandidateTypes) -> Recipe:
    """The recipe with candidates by name, so that it asks for the same ones in any folder."""
    expert, dense = (tuple(one.name for one in group) for group in (types.expert, types.dense))
    return replace(recipe, sensitivity=replace(recipe.sensitivity, types=expert, dense_types=dense))


def with_measured_packing(recipe: Recipe, measured: Packing) -> Recipe:
    """The recipe with the packing that candidates were measured with, which the file will have.

    Raises:
        UsageError: the recipe asks for another packing.
    """
    asked = recipe.sensitivity.packing
    if asked not in (measured, Packing()):
        raise UsageError(
            f"sensitivity.packing: {asked.mode}, but candidates were packed {measured.mode} when they were measured; "
            "give it to `mode-gguf sensitivity`, or leave it out"
        )
    return replace(recipe, sensitivity=replace(recipe.sensitivity, packing=measured))


def measured_candidates(recipe: Recipe, folder: WorkFolder) -> CandidateTypes:
    """The candidate types of a plan from what was measured in the folder: all, unless the recipe names some.

    Raises:
        UsageError, MissingResourceError: as `candidates_of`.
        InputError: `sensitivity` has not run there.
    """
    options = recipe.sensitivity
    if options.types and options.dense_types:
        return candidate_types(options.types, options.dense_types, recipe.plan.floors)
    expert, dense = _measured_types(folder)
    return candidate_types(options.types or expert, options.dense_types or dense, recipe.plan.floors)


def _measured_types(folder: WorkFolder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Types measured by `sensitivity` in the folder, of experts and of all other matrices.

    Raises:
        InputError: it has not run there.
    """
    types = read_metadata(folder.sensitivity, "sensitivity")["types"]
    return tuple(types["expert"]), tuple(types["dense"])


def resolved(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe with what follows from a base GGUF and from where statistics come from.

    Raises:
        UsageError: an option asks for what these cannot give.
    """
    if checkpoint.base is not None:
        recipe = _with_base(checkpoint, recipe)
    if recipe.calibration.from_imatrix is not None:
        recipe = _without_model(recipe, recipe.calibration, recipe.calibration.from_imatrix)
    if recipe.sensitivity.method == MODEL_FREE_METHOD and recipe.plan.costs.combination != "sensitivity":
        raise UsageError(
            f"plan.costs.combination {recipe.plan.costs.combination} and sensitivity {MODEL_FREE_METHOD}, which holds "
            "frequency already, do not go together; leave it out"
        )
    return recipe


def base_warnings(checkpoint: Checkpoint) -> list[str]:
    """Warnings about matrices of a base GGUF that match no matrix of the checkpoint."""
    base = checkpoint.base
    if base is None or not base.unmatched:
        return []
    n_dense = sum(tensor.role in (Role.DENSE, Role.OUTPUT) for tensor in text_tensors(checkpoint))
    shown = ", ".join(base.unmatched[:3])
    return [
        f"{len(base.unmatched)} of {n_dense} matrices beside the experts equal no matrix of the checkpoint ({shown}"
        f"{', ...' if len(base.unmatched) > 3 else ''}): they are planned without statistics, in {UNMEASURED.name} "
        "within the layers"
    ]


def _with_base(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    if recipe.checkpoint.pre_tokenizer is not None:
        raise UsageError("checkpoint.pre_tokenizer: the base GGUF has its tokenizer; leave it out with --base-gguf")
    if recipe.plan.granularity == "expert":
        raise UsageError(
            "--granularity expert needs a llama.cpp of ours, which knows families alone; leave it out with --base-gguf"
        )
    if recipe.plan.budget.fit is not None:
        raise UsageError("--fit knows what memory families take alone; give --size or --bpw with --base-gguf")
    if recipe.plan.unit_kl or recipe.plan.refine:
        raise UsageError(
            "plan.unit_kl and plan.refine measure models of families alone; leave them out with --base-gguf"
        )
    if not projector_tensors(checkpoint) and recipe.calibration.image_samples:
        recipe = replace(recipe, calibration=replace(recipe.calibration, image_samples=0))
    return recipe


def _without_model(recipe: Recipe, calibration: CalibrationOptions, imatrix: Path) -> Recipe:
    given = shell_line(["--calibration-from", imatrix])
    if recipe.preset != "mode" or recipe.sensitivity.method not in ("fisher", MODEL_FREE_METHOD):
        raise UsageError(
            f"{given}: costs are errors weighed by importance ({MODEL_FREE_METHOD}); leave --preset and "
            "sensitivity.method out, which need the model run"
        )
    if recipe.plan.rounding == "feedback":
        raise UsageError(f"{given}: --rounding feedback needs the model run on samples; leave it out")
    if recipe.sensitivity.imatrix == "fisher":
        raise UsageError(f"{given}: sensitivity.imatrix fisher needs gradients of the model; leave it out")
    if recipe.plan.unit_kl or recipe.plan.refine:
        raise UsageError(f"{given}: plan.unit_kl and plan.refine run the model; leave them out")
    if calibration.source is not None:
        raise UsageError(f"{given} and --calibration are two sources of statistics; give one of them")
    return replace(
        recipe,
        sensitivity=replace(recipe.sensitivity, method=MODEL_FREE_METHOD),
        plan=replace(recipe.plan, rounding="nearest"),
    )
