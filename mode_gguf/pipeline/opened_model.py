"""Opening a model: a folder, a name on the hub, or the base GGUF that stands for it, and the work folder for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mode_gguf.architectures import checkpoint_with_base
from mode_gguf.architectures.base_gguf import open_base
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import UsageError
from mode_gguf.hub.source import Download, checkpoint_folder, checkpoint_outline
from mode_gguf.pipeline.run import Run
from mode_gguf.progress import Progress, silent
from mode_gguf.recipe import Recipe
from mode_gguf.workfolder import WorkFolder, file_stem


def open_model(
    model: str | Path | None, out: Path | None = None, recipe: Recipe | None = None, progress: Progress = silent
) -> Run:
    """A run on a model, in the folder `out` or in `<name>-mode-gguf` in the current folder.

    `model` is a folder, or the name of a model on the hub, which is downloaded; see `mode_gguf.hub.source`. None stands
    for the base GGUF alone, which is enough where no model is run.

    Raises:
        UsageError: neither a model nor what stands for it, or a projector without its text model.
        InputError: the model or its base cannot be used.
    """
    recipe = recipe or Recipe()
    _check_given(model, recipe)
    path = None if model is None else checkpoint_folder(model, progress)
    return _opened(path, out, recipe, progress, weights=True)


@contextmanager
def outlined_model(model: str | Path | None, out: Path | None, recipe: Recipe) -> Iterator[tuple[Run, Download | None]]:
    """A run for `estimate`, as of `open_model` but without fetching weights, and the download that a real run makes."""
    _check_given(model, recipe)
    if model is None:
        yield _opened(None, out, recipe, silent, weights=True), None
        return
    with checkpoint_outline(model) as (path, download):
        yield _opened(path, out, recipe, silent, weights=download is None), download


def _check_given(model: str | Path | None, recipe: Recipe) -> None:
    options = recipe.checkpoint
    if options.base_gguf is None and options.base_mmproj is not None:
        raise UsageError("--base-mmproj goes with --base-gguf, the text model's file")
    if model is None and (options.base_gguf is None or recipe.calibration.from_imatrix is None):
        raise UsageError("MODEL is missing: only --base-gguf together with --calibration-from can do without it")


def _opened(path: Path | None, out: Path | None, recipe: Recipe, progress: Progress, *, weights: bool) -> Run:
    """The run; `weights`: whether weights are there, so that a base GGUF's can be looked for among them."""
    options = recipe.checkpoint
    checkpoint = None if path is None else Checkpoint.open(path, options.pre_tokenizer)
    if options.base_gguf is not None:
        base = open_base(options.base_gguf, options.base_mmproj)
        measured = recipe.calibration.from_imatrix is None
        checkpoint = checkpoint_with_base(checkpoint, base, compared=weights, measured=measured)
    assert checkpoint is not None
    folder = WorkFolder(out or Path.cwd() / f"{file_stem(checkpoint.name)}-mode-gguf", checkpoint.name)
    kept = replace(checkpoint.identity, kept=folder.digests)
    return Run(replace(checkpoint, identity=kept), folder, progress)
