"""Preflight: before anything is measured, everything that later stages need beside weights is built once.

What would stop a conversion after hours, at its last stage, stops it in the first seconds: tokenizer and template, keys
and shapes of both files as llama.cpp reads them, the samples, and what validation will ask for.
"""

import logging
from pathlib import Path

from mode_gguf.architectures import find_family, projector_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.estimate.machine import available_memory
from mode_gguf.export.mtp import mtp_outline
from mode_gguf.export.projector import projector_bytes, projector_outline
from mode_gguf.export.text_model import text_outline
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.trial_load import refusal
from mode_gguf.options import ExportOptions, ValidationOptions
from mode_gguf.pipeline.run import Run
from mode_gguf.pipeline.stages.calibrate import checked_samples
from mode_gguf.pipeline.stages.export import reference_fits
from mode_gguf.pipeline.stages.validate import run_settings
from mode_gguf.recipe import Recipe
from mode_gguf.temporary_folders import LockedFolder
from mode_gguf.validation.bounds import check_measurable, given_limits
from mode_gguf.validation.default_held_out import default_held_out
from mode_gguf.validation.questions import HeldOutSet, load_held_out

log = logging.getLogger(__name__)

_SHORT = 32
"""Characters from which on a text has two tokens in any vocabulary, or is no text."""


def check_before_measuring(run: Run, recipe: Recipe, *, inputs: bool = False) -> None:
    """Refuse now what calibration, export or validation would refuse.

    Args:
        recipe: resolved for the model.
        inputs: build the inputs of all samples, too, which calibration does first of all.

    Raises:
        InputError: the checkpoint or a sample cannot be used, or llama.cpp would not open the files.
        UsageError: an option of validation that makes no sense here.
        MissingResourceError: what validation runs in is not there.
    """
    checkpoint = run.checkpoint
    if recipe.validation.validate:
        _check_validation(checkpoint, recipe.validation)
    if checkpoint.base is None:
        from mode_gguf.forward.parameter_shapes import check_parameter_shapes

        check_parameter_shapes(checkpoint)
    check_files(checkpoint, recipe.export)
    if inputs and recipe.calibration.from_imatrix is None:
        from mode_gguf.forward.inputs import InputBuilder

        builder = InputBuilder.open(checkpoint)
        for sample in checked_samples(checkpoint, recipe.calibration):
            builder.build(sample)


def check_files(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Build both files without their weights, and have llama.cpp open them.

    Raises:
        InputError: a key, the tokenizer or a tensor cannot be written, or llama.cpp refuses what would be.
        UsageError: an unknown type.
    """
    with LockedFolder("outline") as folder:
        try:
            written = _write_outlines(checkpoint, options, folder)
        except OSError as error:  # holes take no space, but not on every disk
            log.warning("whether llama.cpp opens the files could not be tried: %s (%s)", folder, error.strerror)
            return
        reason = refusal(*written)
    if reason is not None:
        raise InputError(
            f"{checkpoint.path}: llama.cpp would not open the files of this model ({find_family(checkpoint).gguf_arch}"
            f"): {reason}; use configuration and tokenizer as they were published with these weights"
        )


def _write_outlines(checkpoint: Checkpoint, options: ExportOptions, folder: Path) -> list[Path]:
    """Both files without their weights; the projector is left out where it is large."""
    model, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    text_outline(checkpoint).write(model)
    if options.mtp:
        mtp_outline(checkpoint, options.mtp).write(folder / "mtp.gguf")
    if not projector_tensors(checkpoint):
        return [model]
    projector_outline(checkpoint, options.mmproj_type).write(mmproj)
    # llama.cpp reads a projector's weights, holes or not.
    small = projector_bytes(checkpoint, options.mmproj_type) < available_memory() / 4
    return [model, mmproj] if small else [model]


def _check_validation(checkpoint: Checkpoint, options: ValidationOptions) -> None:
    run_settings(options)
    find_llama_cpp(options.llama_cpp)
    held_out = load_held_out(options.samples, outside=options.allow_outside_samples) if options.samples else None
    if checkpoint.base is None:
        _check_asked(checkpoint, held_out or default_held_out())
    if given_limits(options.limits):
        check_measurable(
            options.limits,
            held_out or default_held_out(),
            with_reference=reference_fits(checkpoint),
            with_images=bool(projector_tensors(checkpoint)),
        )


def _check_asked(checkpoint: Checkpoint, held_out: HeldOutSet) -> None:
    """Refuse a checkpoint that questions cannot be put to, and texts of a single token, after which nothing follows."""
    if held_out.questions and projector_tensors(checkpoint):
        from mode_gguf.forward.inputs import check_inputs

        check_inputs(checkpoint)
    short = [text for text in held_out.texts if len(text) < _SHORT]
    if not short:
        return
    from mode_gguf.forward.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(checkpoint, find_family(checkpoint))
    for text in short:
        if len(tokenizer(text)["input_ids"]) < 2:
            raise InputError(f"held-out set {held_out.name}: text {text!r} is shorter than two tokens; lengthen it")
