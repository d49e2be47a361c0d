"""Samples in the keys of stages: the contents that are really used, wherever their files lie."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from mode_gguf.artifacts import fingerprint
from mode_gguf.checkpoint.identity import PROCESSOR, TEMPLATE, TOKENIZER, side_files
from mode_gguf.file_digests import digests_of
from mode_gguf.options import CalibrationOptions, ValidationOptions
from mode_gguf.pipeline.run import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mode_gguf.data.sample import Sample

_PLACES: Final = ("origin",)
"""Fields that say where a sample comes from."""


def calibration_samples(options: CalibrationOptions) -> "Sequence[Sample]":
    """The samples that the options stand for."""
    from mode_gguf.data.samples import load_samples

    return load_samples(
        options.source,
        max_image_samples=options.image_samples,
        max_text_samples=options.text_samples,
        seed=options.seed,
    )


def calibration_key(run: Run, options: CalibrationOptions) -> dict[str, Any]:
    """The samples that the options choose, pictures included, and the files of the model that their inputs are made by.

    What the built-in set holds goes with its stage's schema number; a data set on the hub is not asked again.

    Raises:
        InputError: a sample cannot be read.
    """
    source = options.source
    if source is None or not Path(source).exists():
        read = side_files(run.checkpoint.path, TOKENIZER, TEMPLATE, PROCESSOR)
        return {**read, "calibration data": source or "built-in", "its samples": None}
    chosen = (source, options.image_samples, options.text_samples, options.seed, _stamps(Path(source)))
    if chosen not in run.known:
        run.known[chosen] = calibration_samples(options)
    samples: Sequence[Sample] = run.known[chosen]
    kinds = [TOKENIZER]
    kinds += [TEMPLATE] if any(one.messages for one in samples) else []
    kinds += [PROCESSOR] if any(one.has_image for one in samples) else []
    read = side_files(run.checkpoint.path, *kinds)
    return {**read, "calibration data": Path(source).name, "its samples": fingerprint(_content(samples))}


def held_out_contents(run: Run, options: ValidationOptions) -> str | None:
    """Digest of a held-out set, pictures included; None for the built-in one.

    Raises:
        InputError: it cannot be read.
    """
    source = options.samples
    if source is None:
        return None
    chosen = (source, _stamps(source))
    if chosen not in run.known:
        from mode_gguf.validation.questions import load_held_out

        run.known[chosen] = load_held_out(source, outside=options.allow_outside_samples)
    return fingerprint(_content(run.known[chosen]))


def _stamps(source: Path) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times of the files in a folder, or of a file: while they stay, samples are not read again."""
    files = (file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    return tuple(sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()))


def _content(value: Any) -> Any:
    """What a value comes to without places: files and pictures as digests."""
    if isinstance(value, Path):
        return [value.name, *digests_of([value])]
    if is_dataclass(value):
        return [_content(getattr(value, one.name)) for one in fields(value) if one.name not in _PLACES]
    if isinstance(value, Mapping):
        return {str(key): _content(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_content(one) for one in value]
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value
