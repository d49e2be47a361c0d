"""Planning: plan.json and tensor-types.txt, from measured costs."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.planner import expert_plan, optimal_plan, plan_of
from mode_gguf.artifacts import write_text
from mode_gguf.checkpoint.identity import PROCESSOR, side_files
from mode_gguf.export.tensor_types import tensor_types_text
from mode_gguf.pipeline.followed_plan import followed_plan
from mode_gguf.pipeline.gpu_budget import with_breakdown
from mode_gguf.pipeline.planning import PlanningProblem, planning_problem
from mode_gguf.pipeline.refinement import measure_plans, refine
from mode_gguf.pipeline.run import Run, Stage, base_key
from mode_gguf.pipeline.settings import PlanSettings, Target
from mode_gguf.pipeline.stages.sensitivity import MeasureSensitivity
from mode_gguf.pipeline.stages.unit_kl import kl_measurement
from mode_gguf.workfolder import WorkFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MakePlan(Stage):
    """Writes plan.json, and tensor-types.txt for llama-quantize where it can do the same. An edited plan is followed.

    Attributes:
        sensitivity: the stage whose samples and packing a refined plan is measured with; None where none is refined.
        target: the sizes that the budget leaves, where they are known already.
    """

    settings: PlanSettings
    sensitivity: MeasureSensitivity | None = None
    target: Target | None = field(default=None, compare=False)
    name: ClassVar[str] = "plan"

    def key(self, run: Run) -> dict[str, Any]:
        folder, settings = run.folder, self.settings
        measured = [folder.calibration, folder.sensitivity, folder.imatrix, folder.imatrix_of("fisher")]
        if settings.preset.unit_kl:
            measured.append(folder.unit_kl)
        budget = settings.budget
        return {
            **base_key(run.checkpoint, "plan"),
            "measured": {path.name: run.cache.identity(path) for path in measured},
            "budget": f"{budget.kind} {budget.value:.15g}",
            **({"fit": budget.fit.model_dump()} if budget.fit else {}),
            "preset": asdict(settings.preset),
            "types": [quant_type.name for quant_type in settings.types.expert],
            "dense types": [quant_type.name for quant_type in settings.types.dense],
            "floors": {role.value: floor.name for role, floor in settings.types.floors.items()},
            "granularity": settings.granularity,
            "rounding": settings.rounding,
            "pre-tokenizer": run.checkpoint.pre_tokenizer,
            "called": run.checkpoint.repository,
            "revision": run.checkpoint.revision,
            **self._beside_tensors(run),
            **({"refinement": self._refinement(run)} if settings.refine else {}),
        }

    def _beside_tensors(self, run: Run) -> dict[str, Any]:
        """What a budget pays for beside tensors, where it pays for anything: metadata, or what else a GPU holds."""
        if self.settings.budget.kind not in ("size", "fit"):
            return {}
        target = self.target or self.settings.target(run.checkpoint)
        pictures = side_files(run.checkpoint.path, PROCESSOR) if self.settings.budget.fit else {}
        return {"bytes beside tensors": target.overhead, **pictures}

    def _refinement(self, run: Run) -> dict[str, Any]:
        """Settings that only a refined plan depends on."""
        assert self.sensitivity is not None
        samples, calibration = self.settings.measured_samples, self.sensitivity.calibrate.key(run)
        return {"rounds": self.settings.refine, "measured samples": samples, "calibration": calibration}

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return run.folder.plan, run.folder.tensor_types

    def is_current(self, run: Run) -> bool:
        """Whether the plan in the folder is for these settings, even if it was edited."""
        state, cache, plan = self.state(run), run.cache, run.folder.plan
        if plan not in cache.edited(state):
            return cache.is_current(state)
        if cache.has_settings(state):
            log.warning("%s was edited and is followed as it is; remove it to have it made again", plan)
            save_tensor_types(run.folder, followed_plan(run.folder))
            return True
        kept = plan.with_name("plan-edited.json")
        plan.replace(kept)
        log.warning("the plan that was edited is kept as %s; a new one is made for other settings", kept)
        return False

    def execute(self, run: Run) -> None:
        """Raises:
        InfeasibleBudgetError: the budget is out of reach.
        InputError: the measurements are missing or belong to another model.
        UsageError: they were made for another preset.
        """
        target = self.target or self.settings.target(run.checkpoint)
        problem = planning_problem(run, self.settings, target)
        with run.recorded(self):
            plan = self._refined(run, problem) if self.settings.refine else self._solved(problem)
            plan = plan.model_copy(update={"rounding": self.settings.rounding})
            save_plan(run.folder, with_breakdown(run.checkpoint, plan))

    def _solved(self, problem: PlanningProblem) -> Plan:
        budget = self.settings.budget
        plan = optimal_plan(problem.problem, problem.made_from, budget, problem.packing)
        if self.settings.granularity == "tensor":
            return plan
        return _better(expert_plan(problem.problem, problem.made_from, budget, problem.packing), plan)

    def _refined(self, run: Run, problem: PlanningProblem) -> Plan:
        """The plan improved by measuring it and its neighbours on calibration samples, rounded to nearest."""
        assert self.sensitivity is not None
        settings, solved = self.settings, problem.problem
        units = solved.tensor_units()
        first = solved.solve(units)
        model, kl_settings = kl_measurement(run, self.sensitivity, settings.measured_samples)
        refined = refine(
            units,
            first.choices,
            solved.unit_bytes,
            measure_plans(model, kl_settings, solved.tensors, run.progress),
            answer_weights=settings.preset.costs.answer_weights,
            rounds=settings.refine,
        )
        best = replace(first, choices=refined.choices)
        plan = plan_of(solved, units, best, problem.made_from, settings.budget, problem.packing)
        return plan.model_copy(update={"refinement": list(refined.history)})


def save_plan(folder: WorkFolder, plan: Plan) -> None:
    """Write plan.json, and tensor-types.txt for llama-quantize where it can do the same."""
    plan.save(folder.plan)
    save_tensor_types(folder, plan)


def save_tensor_types(folder: WorkFolder, plan: Plan) -> None:
    """Write tensor-types.txt, or remove it where llama-quantize has no such types."""
    if plan.has_expert_groups:
        folder.tensor_types.unlink(missing_ok=True)
    else:
        write_text(folder.tensor_types, tensor_types_text(plan.stored_types))


def _better(by_expert: Plan, by_tensor: Plan) -> Plan:
    """The plan with a type per expert, unless it costs more.

    Near the smallest size there is, the projections of an expert, which share a type in one and not in the other, are
    what is left to choose.
    """
    assert by_expert.solver is not None
    assert by_tensor.solver is not None
    if by_expert.solver.objective < by_tensor.solver.objective:
        return by_expert
    log.warning("at this size a type per tensor costs no more than a type per expert, so that is planned")
    return by_tensor
