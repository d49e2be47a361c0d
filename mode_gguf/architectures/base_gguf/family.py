"""A family made at run time, for a checkpoint whose names, metadata and tensors come from a base GGUF."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from gguf import Keys

from mode_gguf.architectures.base_gguf.files import BaseGguf
from mode_gguf.architectures.base_gguf.match import with_matches
from mode_gguf.architectures.base_gguf.same_settings import check_settings
from mode_gguf.architectures.base_gguf.same_weights import check_weights
from mode_gguf.architectures.common_keys import Metadata
from mode_gguf.architectures.family import ModelFamily, TextModel, VisionTower
from mode_gguf.architectures.hparams import Hparams, config
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.identity import ModelIdentity
from mode_gguf.errors import InputError

T = TypeVar("T")

_IMAGE_TOKENS: Final = ("image_token_id", "image_token_index")
_NO_IMAGE: Final = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Outputs of a processor that are not the image."""


def checkpoint_with_base(
    checkpoint: Checkpoint | None, base: BaseGguf, *, compared: bool = True, measured: bool = True
) -> Checkpoint:
    """A checkpoint whose text model and projector are those of a base GGUF, once they are known to go together.

    Args:
        checkpoint: None for a conversion that runs no model.
        compared: whether weights are compared, which have to be there.
        measured: whether the model is run, so that dense matrices are looked for in it, too.

    Raises:
        InputError: the base is another model's, or lacks the projector of a model with a vision encoder.
    """
    if checkpoint is None:
        return Checkpoint(base.text.files[0], base.name, None, None, {}, {}, ModelIdentity("", base.files), base)
    if base.projector is None and has_vision(checkpoint.config):
        raise InputError(
            f"{checkpoint.path}: config.json names a vision encoder; make its projector with convert_hf_to_gguf.py "
            "--mmproj, and give it with --base-mmproj"
        )
    identity = replace(checkpoint.identity, files=(*checkpoint.identity.files, *base.files))
    check_settings(checkpoint, base)
    if compared:
        check_weights(checkpoint, base)
    if compared and measured:
        base = with_matches(checkpoint, base)
    return replace(checkpoint, base=base, identity=identity)


def has_vision(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a model with a vision encoder."""
    return any(isinstance(config.get(part), dict) for part in ("vision_config", "thinker_config"))


def base_family(checkpoint: Checkpoint, base: BaseGguf) -> ModelFamily:
    """The family of a base GGUF; its rules are empty, since the base has tensors, and its tokenizer is copied."""
    classes = checkpoint.config.get("architectures")
    projector: Metadata = base.projector.metadata if base.projector else {}
    no_check, no_ranges = partial(_always, None), partial(_always, {})  # llama.cpp's converter has checked
    return ModelFamily(
        hf_class=str(classes[0]) if isinstance(classes, list) and classes else base.architecture,
        text=TextModel(base.architecture, config, (), partial(_always, base.text.metadata), no_check, no_ranges),
        vision=VisionTower(
            str(projector.get(Keys.Clip.PROJECTOR_TYPE, "")),
            config,
            (),
            partial(_always, projector),
            no_check,
            place_image,
            no_ranges,
            image_token=image_token,
        ),
        tokenizer=Tokenizer(""),
    )


def _always(value: T, hparams: Hparams) -> T:
    """`value`, whatever the hyperparameters are."""
    return value


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
    """The image as the checkpoint's processor puts it into a prompt, marks of rows and ends included.

    Where there is only an image processor (one for video may be missing), a grid of patches says how many tokens.

    Raises:
        InputError: nothing says how many tokens stand for the image.
    """
    if hasattr(place.processor, "image_processor"):
        return _placed_by_processor(place)
    processor, options = place.processor, {}
    size = dict(processor.size) if isinstance(getattr(processor, "size", None), Mapping) else {}
    if "longest_edge" in size and "shortest_edge" in size and size["longest_edge"] > 1 << 14:  # areas, not lengths
        longest = min(size["longest_edge"], place.max_pixels)
        options = {"size": size | {"longest_edge": longest, "shortest_edge": min(size["shortest_edge"], longest)}}
    processed = processor(images=[place.image], return_tensors="np", **options)
    if "image_grid_thw" not in processed:
        raise InputError(
            f"{place.checkpoint.path}: its image processor does not say how many tokens an image takes, and its whole "
            "processor cannot be loaded; calibrate on text alone with --image-samples 0, or give llama-imatrix's file "
            "with --calibration-from"
        )
    count = int(processed["image_grid_thw"].prod()) // int(processor.merge_size) ** 2
    arrays = {name: values for name, values in processed.items() if hasattr(values, "dtype")}
    return PlacedImage([place.image_token] * count, arrays)


def _placed_by_processor(place: ImagePlace) -> PlacedImage:
    text, images = [place.tokenizer.convert_ids_to_tokens(place.image_token)], [place.scaled_image]
    processed = place.processor(text=text, images=images, add_special_tokens=False, return_tensors="np")
    arrays = {name: np.asarray(values) for name, values in processed.items() if name not in _NO_IMAGE}
    return PlacedImage([int(number) for number in processed["input_ids"][0]], arrays)
