"""KL divergence in llama.cpp of files of a work folder from its full-precision file, on a held-out set.

The steps of every experiment that compares files: plan, export, run beside the full-precision file.
"""

from pathlib import Path

from mode_gguf import pipeline
from mode_gguf.allocation.plan import Plan
from mode_gguf.options import ComputeOptions, ValidationOptions
from mode_gguf.validation.report import Divergence, ValidationReport
from mode_gguf.validation.validate import ComparedModels
from mode_gguf.vocabulary import ImatrixKind


def planned(
    run: pipeline.Run, settings: pipeline.PlanSettings, sensitivity: pipeline.MeasureSensitivity | None = None
) -> Plan:
    """The best plan, which becomes the work folder's.

    Args:
        sensitivity: where a plan is refined; see `MakePlan`.

    Raises:
        InfeasibleBudgetError: the budget is out of reach.
    """
    run.ensure(pipeline.MakePlan(settings, sensitivity))
    return Plan.load(run.folder.plan)


def exported(run: pipeline.Run, plan: Plan, imatrix: ImatrixKind | None = None) -> Path:
    """The text model of a plan, rounded as that says; the work folder does not remember it.

    Args:
        imatrix: that packs; None for the one that the plan's measurements were packed with.
    """
    if plan.rounding == "feedback":
        calibrate = pipeline.Calibrate.of_folder(run, ComputeOptions())
        run.ensure(pipeline.RoundWithFeedback(plan, calibrate, imatrix))
    export = pipeline.ExportText(plan, imatrix=imatrix)
    export.write(run)
    return export.outputs(run)[0]


def full_precision(run: pipeline.Run) -> Path:
    """The work folder's full-precision text model, written if it is not there."""
    reference = pipeline.ExportReference()
    run.ensure(reference)
    return reference.outputs(run)[0]


def compared(run: pipeline.Run, text: Path, held_out: Path, plan: Plan | None = None) -> ValidationReport:
    """A text model beside the full-precision one, both with the work folder's projector; the report lies beside it.

    Answers about pictures are scored on the right ones, as in all tables in docs/EXPERIMENTS.md. The reference's
    distributions are kept for the next file that runs in the same build of llama.cpp.

    Args:
        plan: that the text model was made by, where it was.
    """
    projector = pipeline.ExportProjector()
    run.ensure(projector)
    build = "groups" if plan and plan.has_expert_groups else "stock"
    return pipeline.validate_file(
        ComparedModels(text, full_precision(run), projector.outputs(run)[0], plan.stored_types if plan else None),
        text.with_suffix(".json"),
        ValidationOptions(samples=held_out, answers="given"),
        reference_folder=run.folder.path / f"reference-{held_out.name}-{build}",
    )


def mean_and_error(divergence: Divergence | None) -> tuple[float, float]:
    """KL's mean and its standard error, nats per token.

    Raises:
        SystemExit: the held-out set has none of this kind.
    """
    if divergence is None or divergence.kl_mean is None or divergence.kl_mean_error is None:
        raise SystemExit("the held-out set needs texts and questions about pictures")
    return divergence.kl_mean, divergence.kl_mean_error


def shown(kl: tuple[float, float]) -> str:
    """A mean and its standard error, for a table."""
    return "{:.5f} ± {:.5f}".format(*kl)
