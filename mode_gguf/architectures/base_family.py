"""A family made at run time, for a checkpoint whose names, metadata and tensors come from a base GGUF."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from gguf import Keys

from mode_gguf.architectures import base_match
from mode_gguf.architectures.base_gguf import BaseGguf
from mode_gguf.architectures.family import Metadata, ModelFamily
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError

_IMAGE_TOKENS: Final = ("image_token_id", "image_token_index")
_TOKEN_COUNTS: Final = ("image_seq_length", "mm_tokens_per_image")


def checkpoint_with_base(checkpoint: Checkpoint | None, base: BaseGguf, *, compared: bool = True) -> Checkpoint:
    """A checkpoint whose text model and projector are those of a base GGUF, once they are known to go together.

    Args:
        checkpoint: None for a conversion that runs no model.
        compared: whether weights are looked for in the checkpoint, which the statistics of dense matrices need.

    Raises:
        InputError: the base is another model's, or lacks the projector of a model that sees.
    """
    if checkpoint is None:
        return Checkpoint(base.text.files[0], base.name, None, None, {}, {}, base.fingerprint, base)
    if base.projector is None and sees(checkpoint.config):
        raise InputError(
            f"{checkpoint.path}: config.json names a vision encoder; make its projector with convert_hf_to_gguf.py "
            "--mmproj, and give it with --base-mmproj"
        )
    both = f"{checkpoint.fingerprint} {base.fingerprint}".encode()
    if compared:
        base = base_match.compared(checkpoint, base)
    return replace(checkpoint, base=base, fingerprint=hashlib.sha256(both).hexdigest()[:16])


def sees(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a model with a vision encoder."""
    return any(isinstance(config.get(part), dict) for part in ("vision_config", "thinker_config"))


def base_family(checkpoint: Checkpoint, base: BaseGguf) -> ModelFamily:
    """What the stages ask a family for; the rules are empty, since the base has tensors, not recipes for them."""
    classes = checkpoint.config.get("architectures")
    projector = base.projector.metadata if base.projector else {}
    return ModelFamily(
        hf_class=str(classes[0]) if isinstance(classes, list) and classes else base.architecture,
        gguf_arch=base.architecture,
        projector_type=str(projector.get(Keys.Clip.PROJECTOR_TYPE, "")),
        text_rules=(),
        projector_rules=(),
        ignored=(),
        check=lambda checkpoint: None,
        ranges=lambda checkpoint: {},
        text_metadata=_text_metadata,
        projector_metadata=_projector_metadata,
        tied_output="",
        place_image=place_image,
        image_token=image_token,
    )


def _text_metadata(checkpoint: Checkpoint) -> Metadata:
    assert checkpoint.base is not None
    return checkpoint.base.text.metadata


def _projector_metadata(checkpoint: Checkpoint) -> Metadata:
    assert checkpoint.base is not None
    return checkpoint.base.projector.metadata if checkpoint.base.projector else {}


def image_token(checkpoint: Checkpoint) -> int:
    """Id of the token that stands for a piece of an image.

    Raises:
        InputError: config.json names none.
    """
    for settings in (checkpoint.config, checkpoint.config.get("thinker_config", {})):
        for key in _IMAGE_TOKENS:
            if isinstance(settings.get(key), int):
                return int(settings[key])
    raise InputError(
        f"{checkpoint.path / 'config.json'}: names no {' or '.join(_IMAGE_TOKENS)}; calibrate on text alone with "
        "--image-samples 0"
    )


def place_image(place: ImagePlace) -> PlacedImage:
    """The image as its processor prepares it, and as many tokens as a grid of patches or the configuration says.

    Raises:
        InputError: neither says how many tokens stand for the image.
    """
    processor, options = place.processor, {}
    size = dict(processor.size) if isinstance(getattr(processor, "size", None), Mapping) else {}
    if "longest_edge" in size and "shortest_edge" in size and size["longest_edge"] > 1 << 14:  # areas, not lengths
        longest = min(size["longest_edge"], place.max_pixels)
        options = {"size": size | {"longest_edge": longest, "shortest_edge": min(size["shortest_edge"], longest)}}
    processed = processor(images=[place.image], return_tensors="np", **options)
    if "image_grid_thw" in processed:
        count = int(processed["image_grid_thw"].prod()) // int(processor.merge_size) ** 2
    else:
        settings = {**vars(processor), **place.checkpoint.config}
        counts = [settings[key] for key in _TOKEN_COUNTS if isinstance(settings.get(key), int)]
        if not counts:
            raise InputError(
                f"{place.checkpoint.path}: its image processor does not say how many tokens an image takes; calibrate "
                "on text alone with --image-samples 0, or give llama-imatrix's file with --calibration-from"
            )
        count = int(counts[0])
    arrays = {name: values for name, values in processed.items() if hasattr(values, "dtype")}
    return PlacedImage([place.image_token] * count, arrays)
