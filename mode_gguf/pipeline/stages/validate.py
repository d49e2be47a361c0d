"""Validation: a finished file beside its reference in llama.cpp; report.json and the page made of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import projector_tensors
from mode_gguf.artifacts import SCHEMAS, fingerprint, write_text
from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp.c_api import library_version
from mode_gguf.llama_cpp.engines import named_engine
from mode_gguf.llama_cpp.gpu_offload import placement_of
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.runtime.installed import find_runtime
from mode_gguf.options import ExportOptions, ValidationOptions
from mode_gguf.pipeline.report_data import conversion_record
from mode_gguf.pipeline.run import Run, Stage
from mode_gguf.pipeline.samples_key import held_out_contents
from mode_gguf.pipeline.settings import base_warnings
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.pipeline.stages.calibrate import stored_warnings
from mode_gguf.pipeline.stages.export import (
    REFERENCE_TYPE,
    ExportProjector,
    ExportReference,
    ExportText,
    fits_to_compare,
    projector_path,
    reference_fits,
)
from mode_gguf.pipeline.stages.feedback import RoundWithFeedback, warnings_of_rounding
from mode_gguf.pipeline.stages.probes import stored_probes
from mode_gguf.probes import Probes
from mode_gguf.progress import Progress, silent
from mode_gguf.validation.conversion_record import ConversionRecord
from mode_gguf.validation.questions import load_held_out
from mode_gguf.validation.reference import RunSettings
from mode_gguf.validation.report import ValidationReport
from mode_gguf.validation.validate import ComparedModels, validate
from mode_gguf.vocabulary import ProjectorType
from mode_gguf.workfolder import WorkFolder, failure_path, uniform_file_name


@dataclass(frozen=True, slots=True)
class Validate(Stage):
    """Compares what `export` wrote with a full-precision file, which is made if this machine can run it."""

    export: ExportText
    options: ValidationOptions = ValidationOptions()
    mmproj_type: ProjectorType = ExportOptions.mmproj_type
    name: ClassVar[str] = "validate"

    def key(self, run: Run) -> dict[str, Any]:
        options = self.options
        return {
            **self.export.key(run),
            "report schema": SCHEMAS["report"],
            "projector": self._projector(run),
            "held-out data": str(options.samples or "built-in"),
            "its samples": held_out_contents(run, options),
            "transformers' predictions": run.cache.identity(run.folder.probes),
            "llama.cpp": options.llama_cpp,
            **self._runtimes(run),
            **_changed(options),
        }

    def _projector(self, run: Run) -> str | None:
        if not projector_tensors(run.checkpoint):
            return None
        return f"{self.mmproj_type} {fingerprint(ExportProjector(self.mmproj_type).key(run))}"

    def _runtimes(self, run: Run) -> dict[str, Any]:
        """What runs the file, and whether this machine can run the one that it is compared with.

        Raises:
            UsageError, InputError, MissingResourceError: a library or tool that cannot be used.
        """
        options, groups = self.options, self.export.resolved_plan(run).has_expert_groups
        asked = ("runtimes", options.library, options.llama_cpp, groups)
        if asked not in run.known:
            engine, runtime = named_engine(options.library) if options.library else None, find_runtime()
            version = engine.version if engine else str(runtime and runtime.version) if groups else library_version()
            run.known[asked] = f"{version}, tools {find_llama_cpp(options.llama_cpp).version}"
        return {"runtime": run.known[asked], "compared": fits_to_compare(run.checkpoint)}

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (run.folder.report,)

    def execute(self, run: Run) -> None:
        """Raises:
        ValidationError: the file cannot be loaded, or does not answer.
        """
        folder, plan = run.folder, self.export.resolved_plan(run)
        with run.recorded(self):
            reference = None
            if reference_fits(run.checkpoint):
                written = ExportReference(self.export.compute)
                run.ensure(written)
                (reference,) = written.outputs(run)
            with_projector = projector_tensors(run.checkpoint)
            validate_file(
                ComparedModels(
                    self.export.outputs(run)[0],
                    reference,
                    projector_path(folder, self.mmproj_type) if with_projector else None,
                    plan.stored_types,
                    stored_probes(folder, run.checkpoint.fingerprint),
                ),
                folder.report,
                self.options,
                Notes((*base_warnings(run.checkpoint), *_warnings(run, self.export, plan)), conversion_record(folder)),
                reference_folder=folder.reference,
                progress=run.progress,
            )


@dataclass(frozen=True, slots=True)
class Notes:
    """Additions to a report: warnings, and the conversion record of the file."""

    warnings: Sequence[str] = ()
    conversion: ConversionRecord | None = None


def validate_file(
    compared: ComparedModels,
    report: Path,
    options: ValidationOptions,
    notes: Notes = Notes(),
    *,
    threads: int | None = None,
    reference_folder: Path | None = None,
    progress: Progress = silent,
) -> ValidationReport:
    """Run a file and its reference in llama.cpp, compare them, and write the report to `report`.

    The report says which limits are kept; `validation.bounds.require_kept` stops where one is not.

    Raises:
        ValidationError: the file cannot be loaded, or does not answer.
        InputError, UsageError: the held-out set or an option cannot be used.
    """
    with _failure_noted(report):
        result = validate(
            compared,
            load_held_out(options.samples, outside=options.allow_outside_samples) if options.samples else None,
            tools=find_llama_cpp(options.llama_cpp),
            settings=run_settings(options, threads),
            reference_folder=reference_folder,
            limits=options.limits,
            progress=progress,
        )
    warnings = (*result.warnings, *notes.warnings)
    result = result.model_copy(update={"warnings": warnings, "conversion": notes.conversion})
    result.save(report)
    return result


def probes_beside(reference: Path) -> Probes | None:
    """The probes in a work folder whose full-precision file is `reference`; None for any other file."""
    try:
        probes = Probes.load(WorkFolder(reference.parent, "").probes)
    except InputError:
        return None
    return probes if reference.name == uniform_file_name(probes.model, REFERENCE_TYPE.name) else None


def run_settings(options: ValidationOptions, threads: int | None = None) -> RunSettings:
    """The settings that options ask for.

    Raises:
        UsageError, InputError: a placement or a library that cannot be used.
    """
    return RunSettings(
        context=options.context,
        threads=threads,
        offload=placement_of(options.placement),
        max_text_tokens=options.text_tokens,
        max_answer_tokens=options.answer_tokens,
        answers=options.answers,
        engine=named_engine(options.library) if options.library else None,
        top_logprobs=options.top_logprobs,
    )


def _changed(options: ValidationOptions) -> dict[str, Any]:
    """Options that change what is measured, where they are not the default."""
    common = ("validate", "samples", "allow_outside_samples", "llama_cpp")
    plain = ValidationOptions()
    alike = replace(options, **{name: getattr(plain, name) for name in common})
    return {} if alike == plain else {"validation": repr(alike)}


def _warnings(run: Run, export: ExportText, plan: Plan) -> list[str]:
    """Warnings of calibration, and of the rounding that the file had: rounding.json may be of another one since."""
    calibrate = export.feedback(run, plan)
    rounded = calibrate and RoundWithFeedback(plan, calibrate, export.imatrix)
    of_file = rounded is not None and run.cache.has_settings(rounded.state(run))
    return [*stored_warnings(run.folder), *(warnings_of_rounding(run.folder) if of_file else [])]


@contextmanager
def _failure_noted(report: Path) -> Iterator[None]:
    """Leave no report of an earlier run where validation fails, but a note of what failed."""
    failure = failure_path(report)
    StageCache(WorkFolder(report.parent, "")).forget("validate")  # if `convert` put its report there
    for before in (report, failure):
        before.unlink(missing_ok=True)
    try:
        yield
    except ValidationError as error:
        write_text(failure, f"{error}\n")
        raise
