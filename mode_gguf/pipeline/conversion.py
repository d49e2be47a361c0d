"""`convert`: all stages on one work folder; those whose settings have not changed are skipped."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mode_gguf.architectures import projector_tensors
from mode_gguf.errors import MissingResourceError
from mode_gguf.estimate.free_resources import memory_warning, shortages
from mode_gguf.export.projector import check_projector_weights
from mode_gguf.pipeline.estimating import ConversionEstimate, estimate
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.pipeline.followed_plan import followed_plan
from mode_gguf.pipeline.preflight import check_before_measuring
from mode_gguf.pipeline.reporting import draw_converted
from mode_gguf.pipeline.run import Run, Stage
from mode_gguf.pipeline.settings import (
    PlanSettings,
    Target,
    base_warnings,
    candidates_of,
    resolved,
    with_types,
)
from mode_gguf.pipeline.stages.calibrate import Calibrate
from mode_gguf.pipeline.stages.export import ExportMtp, ExportProjector, ExportText, projector_path
from mode_gguf.pipeline.stages.plan import MakePlan
from mode_gguf.pipeline.stages.probes import MeasureProbes
from mode_gguf.pipeline.stages.sensitivity import MeasureSensitivity
from mode_gguf.pipeline.stages.unit_kl import MeasureUnitKl
from mode_gguf.pipeline.stages.validate import Validate
from mode_gguf.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """Files that a conversion wrote, and seconds of each stage (0 for one that was reused).

    `model` is the first file of one that is in shards; `size_bytes` counts all of them. Text-only models have no
    `mmproj`.
    """

    model: Path
    mmproj: Path | None
    mtp: Path | None
    imatrix: Path
    plan: Path
    report: Path | None
    page: Path
    bpw: float
    size_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A recipe resolved for one model: the settings that all stages are made from."""

    recipe: Recipe
    settings: PlanSettings
    target: Target
    calibrate: Calibrate
    sensitivity: MeasureSensitivity

    @classmethod
    def of(cls, run: Run, recipe: Recipe) -> "Conversion":
        """Check that the model is supported, options go together and the budget can be met.

        Raises:
            InputError: the checkpoint cannot be converted.
            UsageError: options that do not go together.
            InfeasibleBudgetError: the budget is out of reach.
        """
        recipe = resolved(run.checkpoint, recipe)
        types = candidates_of(recipe, run.folder)
        settings = PlanSettings.of(recipe, types)
        calibrate = Calibrate(recipe.calibration, recipe.compute)
        sensitivity = MeasureSensitivity.of(calibrate, recipe.sensitivity, types)
        return cls(recipe, settings, settings.target(run.checkpoint), calibrate, sensitivity)

    def measuring_stages(self) -> list[Stage]:
        """The measuring stages, whose results take long and are not thrown away unasked."""
        stages: list[Stage] = [self.calibrate, self.sensitivity]
        if self.settings.preset.unit_kl:
            stages.append(MeasureUnitKl(self.sensitivity, self.settings.measured_samples))
        return stages

    def export_stage(self) -> ExportText:
        return ExportText(None, self.recipe.export, self.recipe.compute, self.calibrate)

    def writing_stages(self, run: Run) -> list[Stage]:
        """Stages from the measurements to the files, in their order."""
        options, export = self.recipe.export, self.export_stage()
        stages: list[Stage] = [MakePlan(self.settings, self.sensitivity, self.target), export]
        if projector_tensors(run.checkpoint):
            stages.append(ExportProjector(options.mmproj_type))
        if options.mtp:
            stages.append(ExportMtp(options.mtp, self.recipe.compute))
        if self.recipe.validation.validate:
            if self.recipe.calibration.from_imatrix is None:
                stages.append(MeasureProbes(self.recipe.calibration, self.recipe.compute))
            stages.append(Validate(export, self.recipe.validation, options.mmproj_type))
        return stages


def estimate_conversion(run: Run, recipe: Recipe) -> ConversionEstimate:
    """Estimate of `convert` here, with times; nothing is written. Raises like `Conversion.of`."""
    conversion = Conversion.of(run, recipe)
    check_before_measuring(run, conversion.recipe, inputs=True)
    return estimate(run, conversion.recipe, conversion.settings, conversion.target, measured=True)


def convert(run: Run, recipe: Recipe, *, restart: bool = False) -> ConvertResult:
    """All stages; those whose settings have not changed since the last run in this folder are skipped.

    A run that was cut off at any moment goes on when it is repeated. An edited plan is followed.

    Args:
        restart: whether measuring stages run again whose settings differ from those of the last run in the folder.

    Raises:
        MissingResourceError: the disks have too little space for it.
        UsageError: what was measured in this folder had other settings, and `restart` is not set.
        ModeGgufError: whatever the stages raise; what earlier stages wrote stays and is reused next time.
    """
    conversion = Conversion.of(run, recipe)
    if not _has_calibrated(run, conversion):  # else it was checked when that ran
        check_before_measuring(run, conversion.recipe)
    expected = estimate(run, conversion.recipe, conversion.settings, conversion.target)
    for shortage in shortages(expected.stages, expected.free):
        raise MissingResourceError(shortage)
    if warning := memory_warning(expected.stages, expected.free):
        log.warning("%s", warning)
    with folder_lock(run.folder):
        for warning in base_warnings(run.checkpoint):
            log.warning("%s", warning)
        run.identify()
        if not restart:
            run.cache.check_unchanged([stage.state(run) for stage in conversion.measuring_stages()])
        projector = ExportProjector(conversion.recipe.export.mmproj_type)
        if projector_tensors(run.checkpoint) and not projector.is_current(run):
            check_projector_weights(run.checkpoint, projector.type)
        run.ensure(*conversion.measuring_stages())
        with_types(recipe, conversion.settings.types).save(run.folder.recipe)
        run.ensure(*conversion.writing_stages(run))
        return _result(run, conversion)


def _has_calibrated(run: Run, conversion: Conversion) -> bool:
    if not run.folder.stages.exists():
        return False
    run.identify()
    return conversion.calibrate.is_current(run)


def _result(run: Run, conversion: Conversion) -> ConvertResult:
    folder, recipe = run.folder, conversion.recipe
    plan = followed_plan(folder)
    files = conversion.export_stage().outputs(run)
    validated = recipe.validation.validate
    mtp = ExportMtp(recipe.export.mtp).outputs(run)[0] if recipe.export.mtp else None
    return ConvertResult(
        model=files[0],
        mmproj=projector_path(folder, recipe.export.mmproj_type) if projector_tensors(run.checkpoint) else None,
        mtp=mtp,
        imatrix=folder.imatrix_of(conversion.sensitivity.imatrix),
        plan=folder.plan,
        report=folder.report if validated else None,
        page=draw_converted(folder, recipe.validation, validated=validated),
        bpw=plan.bpw,
        size_bytes=sum(file.stat().st_size for file in files),
        seconds=run.seconds,
    )
