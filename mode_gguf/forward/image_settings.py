"""Settings of a checkpoint's image processor that no picture could be prepared with, or only in terabytes."""

import math
from collections.abc import Mapping
from typing import Any

from mode_gguf.architectures.hparams import Hparams, image_hparams
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

_LENGTHS = ("patch_size", "merge_size", "temporal_patch_size", "pooling_kernel_size", "spatial_merge_size")
_SHARED = {
    **{name: name for name in ("patch_size", "temporal_patch_size", "pooling_kernel_size")},
    "merge_size": "spatial_merge_size",
}
"""Lengths that the vision tower has, too, by their names in both places."""
_LONGEST = 1024
"""Pixels or patches, of what a picture is cut into; families have 2 to 32."""
_LONGEST_SIDE = 2**14
_LARGEST_AREA = 2**40
"""Edges longer than a side are areas: what `size` of some processors holds despite its names."""
_COLOURS = 3


def check_image_settings(checkpoint: Checkpoint) -> None:
    """Refuse absurd settings in preprocessor_config.json, or the processor_config.json of transformers 5.

    Raises:
        InputError: a length, size, mean or deviation is none, or the files are missing or broken.
    """
    if checkpoint.base is not None and not (checkpoint.path / "preprocessor_config.json").exists():
        return  # a model of any layout
    settings = image_hparams(checkpoint)
    for name in _LENGTHS:
        _check_counts(settings, name, _LONGEST)
    for name in ("image_mean", "image_std"):
        _check_colours(settings, name)
    _check_counts(settings, "size", _LARGEST_AREA)
    size = settings.get("size", None)
    if isinstance(size, Mapping):
        sides = [size.get(name) for name in ("height", "width")]
        if "longest_edge" not in size:
            sides.append(size.get("shortest_edge"))
        if any(side is not None and side > _LONGEST_SIDE for side in sides):
            settings.refuse("size", f"sides of at most {_LONGEST_SIDE} pixels")
        if (size.get("shortest_edge") or 0) > (size.get("longest_edge") or math.inf):
            settings.refuse("size", "a shortest edge no longer than the longest")
    for name in ("min_pixels", "max_pixels", "max_soft_tokens", "in_token_limit"):
        _check_counts(settings, name, _LARGEST_AREA)
    if (settings.get("min_pixels", None) or 0) > (settings.get("max_pixels", None) or math.inf):
        settings.refuse("min_pixels", f"at most max_pixels, which is {settings.get('max_pixels', None)}")


def check_shared_lengths(checkpoint: Checkpoint, processor: Any) -> None:
    """Refuse lengths other than the vision tower has: pictures would be cut into pieces that it does not take.

    Args:
        processor: transformers' image processor, which has a value of its own for what its file leaves out.

    Raises:
        InputError: naming the length, and both values.
    """
    vision = checkpoint.config.get("vision_config")
    for name, own in _SHARED.items():
        wanted, found = vision.get(own) if isinstance(vision, Mapping) else None, getattr(processor, name, None)
        if isinstance(wanted, int) and isinstance(found, int) and found != wanted:
            raise InputError(
                f"{checkpoint.path}: the image processor's {name} is {found}, expected {wanted}, as vision_config of "
                "config.json has it; use the preprocessor_config.json published with these weights"
            )


def _check_counts(settings: Hparams, name: str, most: int) -> None:
    """Refuse what is neither absent nor a whole number from 1 to `most`, nor several of them."""
    found = settings.get(name, None)
    counts = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list) else [found]
    for count in counts:
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and not (whole and 1 <= count <= most):
            settings.refuse(name, f"a whole number from 1 to {most:,}")


def _check_colours(settings: Hparams, name: str) -> None:
    """Refuse what is neither absent nor a number for each colour, no deviation zero."""
    found: Any = settings.get(name, None)
    if found is None:
        return
    values = found if isinstance(found, list) else [found] * _COLOURS
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    good = len(numbers) == len(values) == _COLOURS and all(map(math.isfinite, numbers))
    if not good or (name == "image_std" and 0 in numbers):
        settings.refuse(name, f"{_COLOURS} finite numbers" + (" other than 0" if name == "image_std" else ""))
