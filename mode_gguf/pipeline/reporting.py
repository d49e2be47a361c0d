"""The report people read: report.html, from report.json and whatever else a work folder holds."""

import logging
import time
from pathlib import Path
from typing import TypeAlias

from mode_gguf.allocation.plan import Plan
from mode_gguf.artifacts import write_text
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.gguf.header import read_header
from mode_gguf.options import ValidationOptions
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.pipeline.report_data import conversion_record, work_folder
from mode_gguf.pipeline.stage_cache import StageCache, StageState, file_identity
from mode_gguf.report.page import matches_plan, render_page, same_bpw
from mode_gguf.validation.conversion_record import ConversionRecord, unknown_conversion
from mode_gguf.validation.default_held_out import default_held_out
from mode_gguf.validation.questions import load_held_out
from mode_gguf.validation.report import ValidationReport
from mode_gguf.workfolder import WorkFolder

BUILT_IN = "built-in"
Images: TypeAlias = dict[tuple[str, str], Path]
"""Files of pictures by their name and the question about them."""

log = logging.getLogger(__name__)


def run_report(path: Path, held_out: Path | None = None, *, outside: bool = False) -> Path:
    """Draw report.html again from the files in a work folder; what report.json says of the conversion is renewed, too.

    Args:
        held_out: the set with the questions' images; None for the one that the folder was validated with.
        outside: whether that may name pictures outside its folder.

    Returns:
        The page.

    Raises:
        InputError: nothing was ever written there, or report.json is none.
    """
    folder = work_folder(path)
    with folder_lock(folder):
        record = conversion_record(folder)
        report = ValidationReport.load(folder.report) if folder.report.exists() else None
        if report and matches_plan(report, record) and report.conversion != record:
            before = file_identity(folder.report)
            report = report.model_copy(update={"conversion": record})
            report.save(folder.report)
            StageCache(folder).update_output("validate", folder.report, before)
        return _draw(folder, record, report, _images(report, held_out or validated_with(folder), outside))


def draw_converted(folder: WorkFolder, options: ValidationOptions, *, validated: bool) -> Path:
    """report.html at the end of a conversion.

    Args:
        options: name the held-out set.
        validated: whether report.json is of this conversion, so that it has all that is to be said of it.
    """
    report = ValidationReport.load(folder.report) if folder.report.exists() else None
    record = report.conversion if report and validated else None
    return _draw(folder, record or conversion_record(folder), report, _pictures(report, options))


def conversion_of(candidate: Path) -> ConversionRecord | None:
    """The conversion record of a file in a work folder whose plan it was made from; None otherwise.

    Raises:
        InputError: the file is no GGUF.
    """
    bpw = read_header(candidate).bpw
    try:
        folder = work_folder(candidate.parent)
        if not folder.plan.exists() or not same_bpw(Plan.load(folder.plan).bpw, bpw):
            return None
        return conversion_record(folder)
    except InputError:
        return None


def draw_validated(path: Path, report: ValidationReport, options: ValidationOptions) -> Path:
    """The page of a validation alone, beside its JSON file `path`, with what that says of the conversion.

    In the place of a work folder's report both are noted as this folder's, so that they can be published.
    """
    reason = "the file does not lie in the work folder that it was made in."
    record = report.conversion or unknown_conversion(report.candidate.name, reason)
    folder, images = WorkFolder(path.parent, ""), _pictures(report, options)
    if path != folder.report or not folder.plan.exists():
        return write_page(path.with_suffix(".html"), record, report, images)
    settings = {"held-out data": str(options.samples or BUILT_IN)}
    StageCache(folder).record(StageState("validate", settings, (path,)), sum(report.seconds.values()))
    return _draw(folder, record, report, images)


def _draw(folder: WorkFolder, record: ConversionRecord, report: ValidationReport | None, images: Images) -> Path:
    """Write a work folder's page, and note of which report.json it is."""
    started = time.monotonic()
    page = write_page(folder.page, record, report, images)
    cache = StageCache(folder)
    state = StageState("report", {folder.report.name: file_identity(folder.report)}, (page,))
    if not cache.is_current(state):
        cache.record(state, round(time.monotonic() - started, 3))
    return page


def write_page(path: Path, record: ConversionRecord, report: ValidationReport | None, images: Images) -> Path:
    """Write the page to `path`, with the questions' pictures as far as they are."""
    write_text(path, render_page(record, report, images))
    return path


def validated_with(folder: WorkFolder) -> Path | None:
    """The held-out set that stages.json names; None for the built-in one, and where nothing was validated."""
    entry = StageCache(folder).entries().get("validate", {})
    source = str(entry.get("settings", {}).get("held-out data", BUILT_IN))
    return None if source == BUILT_IN else Path(str(entry.get("directory", "")), source)


def _pictures(report: ValidationReport | None, options: ValidationOptions) -> Images:
    return _images(report, options.samples, options.allow_outside_samples)


def _images(report: ValidationReport | None, held_out: Path | None, outside: bool) -> Images:
    """Pictures of a held-out set (None for the built-in one); none where it is not what the report's answers are to."""
    if report is None or not report.answers:
        return {}
    try:
        questions = (load_held_out(held_out, outside=outside) if held_out else default_held_out()).questions
    except (InputError, MissingResourceError) as error:
        log.warning("the page has no pictures: %s", error)
        return {}
    return {(question.image.name, question.question): question.image for question in questions}
