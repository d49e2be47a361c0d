"""The stages after validation: the model card, and the upload of what belongs on the hub."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from mode_gguf.allocation.plan import Plan
from mode_gguf.artifacts import read_metadata, write_text
from mode_gguf.errors import InputError, UsageError, ValidationError
from mode_gguf.export.imatrix_file import read_imatrix_header
from mode_gguf.gguf.header import read_header
from mode_gguf.hub.card import model_card
from mode_gguf.hub.local_paths import without_local_paths
from mode_gguf.hub.names import repository_name
from mode_gguf.hub.own_files import check_own, read_own
from mode_gguf.hub.released_files import FileRole, ModelRelease, ReleasedFile, commands_of, sha256_of
from mode_gguf.hub.upload import HubCommit, Upload, upload_files
from mode_gguf.options import PublishingOptions
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.pipeline.followed_plan import followed_plan
from mode_gguf.pipeline.stage_cache import StageCache, StageState, file_identity
from mode_gguf.plain_text import shell_line
from mode_gguf.progress import Progress, silent
from mode_gguf.validation.report import ValidationReport
from mode_gguf.validation.structure import describe
from mode_gguf.workfolder import WorkFolder, failure_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Publication:
    """An upload: its files, README.md's text, and its commit; None where it was only shown."""

    uploads: tuple[Upload, ...]
    card: str
    published: HubCommit | None


def write_card(
    path: Path, repository: str, options: PublishingOptions = PublishingOptions(), progress: Progress = silent
) -> tuple[Path, str]:
    """Write README.md into the work folder `path`; returns its path and text.

    Args:
        options: the original model, and whether a README.md that was edited or comes from elsewhere is replaced.

    Raises:
        UsageError: a README.md is there that would have to be replaced.
        InputError: `path` is no work folder with a finished export, or a file was changed since.
    """
    folder, plan = _opened(path)
    named = repository_name(repository)
    base_model = repository_name(options.base_model) if options.base_model else None
    readme = folder.readme
    with folder_lock(folder):
        if not options.replace_card and not _is_ours(folder):
            raise UsageError(f"{readme}: was edited, or comes from elsewhere; give --replace-card, or move it away")
        release, doubt = _release(folder, plan, progress)
        if doubt:
            log.warning("%s; the card says that nothing was measured", doubt)
        card = model_card(release, named, base_model)
        _save_card(folder, card, named, base_model)
    return readme, card


def publish(
    path: Path, repository: str, options: PublishingOptions = PublishingOptions(), progress: Progress = silent
) -> Publication:
    """Upload what belongs on the hub of the work folder `path`: GGUF files, card, plan and report.

    README.md is made for this repository, unless it was edited.

    Args:
        options: without its `yes` nothing is written or sent.

    Raises:
        UsageError: no name of a repository, or see `hub.upload.upload_files`.
        InputError: `path` is no work folder with a finished export, or a file was changed since, is a link or was put
            there by something else; the hub refuses.
        ValidationError: the files were not validated, or failed, which `unvalidated` does not help.
    """
    named = repository_name(repository)
    base_model = repository_name(options.base_model) if options.base_model else None
    folder, plan = _opened(path)
    check_own(folder.readme, path)
    with folder_lock(folder):
        release, doubt = _release(folder, plan, progress)
        if doubt and not options.unvalidated:
            raise ValidationError(f"{doubt}; validate the file, or give --unvalidated to publish it all the same")
        card = model_card(release, named, base_model) if _is_ours(folder) else _edited_card(folder, release)
        uploads = _uploads(folder, release, card)
        if not options.yes:
            return Publication(uploads, card, None)
        if _is_ours(folder):
            _save_card(folder, card, named, base_model)
        return Publication(uploads, card, upload_files(named, uploads, options.private, progress))


def _opened(path: Path) -> tuple[WorkFolder, Plan]:
    plan_file = WorkFolder(path, "").plan
    check_own(plan_file, path)
    if not plan_file.is_file():
        raise InputError(f"{path}: no work folder (it has no {plan_file.name}); name the one that `convert` filled")
    plan = followed_plan(WorkFolder(path, ""))
    return WorkFolder(path, plan.made_from.model), plan


def _release(folder: WorkFolder, plan: Plan, progress: Progress) -> tuple[ModelRelease, str | None]:
    """The release of the folder, and the reason why its report cannot be trusted, if there is one.

    Raises:
        InputError: no export has finished here, or what it wrote was changed since.
        ValidationError: it failed.
    """
    cache = StageCache(folder)
    settings, model = cache.last_run("export")
    _, projector = cache.last_run("projector")
    if not model or not (projector or settings.get("projector") == "none"):
        raise InputError(f"{folder.path}: no export has finished here; run `mode-gguf convert` or `mode-gguf export`")
    for path, identity in {**model, **projector}.items():
        check_own(path, folder.path)
        if cache.identity(path) != identity:
            raise InputError(f"{path}: is gone, or is not what `export` wrote; export again")
    if settings.get("plan") != plan.fingerprint:
        raise InputError(f"{folder.plan}: was changed after `export` had followed it; export again")
    imatrix = folder.imatrix_of(str(settings.get("imatrix")))
    check_own(imatrix, folder.path)
    if cache.identity(imatrix) != settings.get("imatrix file"):
        raise InputError(f"{imatrix}: is gone, or is not the one that the model was packed with; export again")
    roles: dict[Path, FileRole] = {}
    roles |= dict.fromkeys(model, "text model")
    roles |= dict.fromkeys(projector, "projector")
    roles |= dict.fromkeys([imatrix] if imatrix.exists() else [], "importance matrix")
    about = describe(next(iter(model)))
    projector_bpw = read_header(next(iter(projector))).bpw if projector else None
    bpw = {"text model": about["bpw"], "projector": projector_bpw, "importance matrix": None}
    files = tuple(
        ReleasedFile(path, role, path.stat().st_size, bpw[role], digest)
        for (path, role), digest in zip(roles.items(), sha256_of(list(roles), progress), strict=True)
    )
    report, doubt = _report(folder, files)
    release = ModelRelease(
        files=files,
        model=about,
        plan=plan,
        report=report,
        calibration=read_metadata(folder.calibration) if folder.calibration.exists() else {},
        datasets=read_imatrix_header(imatrix).datasets if imatrix.exists() else (),
        commands=commands_of(folder.log, plan),
    )
    return release, doubt


def _report(folder: WorkFolder, files: tuple[ReleasedFile, ...]) -> tuple[ValidationReport | None, str | None]:
    """The report on just these files; without one, the reason.

    Raises:
        ValidationError: they failed.
    """
    path, failure = folder.report, failure_path(folder.report)
    first = files[0].path
    if failure.exists() and failure.stat().st_mtime >= first.stat().st_mtime:
        message = without_local_paths(failure.read_text(encoding="utf-8").strip(), [folder.path])
        raise ValidationError(f"{first}: validation failed ({message})")
    check_own(path, folder.path)
    if not path.exists():
        return None, f"{path}: not there; the model was never validated"
    report = ValidationReport.load(path)
    cache = StageCache(folder)
    _, last_run = cache.last_run("validate")
    if last_run.get(path) != file_identity(path):
        return None, f"{path}: is not what `validate` wrote"
    sizes = {first.name: sum(file.size_bytes for file in files if file.role == "text model")}
    sizes |= {file.path.name: file.size_bytes for file in files if file.role == "projector"}
    for found in filter(None, (report.candidate, report.mmproj)):
        if sizes.get(found.name) != found.size_bytes:
            return None, f"{path}: speaks of another file, {found.name} of {found.size_bytes:,} bytes"
    if cache.finished("validate") < max(cache.finished("export"), cache.finished("projector")):
        return None, f"{path}: is older than {first.name}"
    broken = [check for check in report.checks if not check.kept]
    if broken:
        raise ValidationError(f"{path}: validation failed, {broken[0].option} {broken[0].limit:g} is not kept")
    return report, None


def _is_ours(folder: WorkFolder) -> bool:
    """Whether README.md may be written: it is not there, or is unchanged since it was written."""
    last_run = StageCache(folder).last_run("card")[1].get(folder.readme)
    return not folder.readme.exists() or last_run == file_identity(folder.readme)


def _save_card(folder: WorkFolder, card: str, repository: str | None, base_model: str | None) -> None:
    started = time.monotonic()
    write_text(folder.readme, card)
    settings = {"repository": repository, "base model": base_model}
    StageCache(folder).record(StageState("card", settings, (folder.readme,)), round(time.monotonic() - started, 3))


def _edited_card(folder: WorkFolder, release: ModelRelease) -> str:
    """A README.md that people changed; it must speak of the files that it comes with."""
    card = read_own(folder.readme)
    for file in release.files:
        if file.sha256 not in card:
            raise InputError(
                f"{folder.readme}: was edited, and its table of files does not have {file.path.name} as it is now "
                f"(sha256 {file.sha256}); correct it, or make it again with `publish --card-only --replace-card`"
            )
    return card


def _has_page(folder: WorkFolder) -> bool:
    """Whether report.html is there and is of report.json as it is.

    Raises:
        InputError: it is not what was drawn here.
    """
    page = folder.page
    check_own(page, folder.path)
    if not page.exists():
        return False
    settings, drawn = StageCache(folder).last_run("report")
    again = f"draw it with `{shell_line(['mode-gguf', 'report', folder.path])}`"
    if drawn.get(page) != file_identity(page):
        raise InputError(f"{page}: is not what was drawn here; {again}, or move it away")
    if settings.get(folder.report.name) != file_identity(folder.report):
        log.warning("%s: is of another %s, and left out; %s", page, folder.report.name, again)
        return False
    return True


def _uploads(folder: WorkFolder, release: ModelRelease, card: str) -> tuple[Upload, ...]:
    """Uploads of a release; texts without local paths."""
    documents = {folder.readme: card, folder.plan: read_own(folder.plan)}
    if release.report:
        documents[folder.report] = read_own(folder.report)
        if _has_page(folder):
            documents[folder.page] = read_own(folder.page)
    contents = {path.name: without_local_paths(text, [folder.path]).encode() for path, text in documents.items()}
    texts = (Upload(name, content, len(content)) for name, content in contents.items())
    return (*(Upload(file.path.name, file.path, file.size_bytes, file.sha256) for file in release.files), *texts)
