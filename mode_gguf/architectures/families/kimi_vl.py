"""Kimi-VL-A3B: llama.cpp's `deepseek2` with a `kimivl` projector.

Its modelling code is published beside the weights only, and not in transformers; such code is never run here. For text
and pictures it computes what transformers' Kimi K2.5 does, so that this one is built from its configuration and given
its weights.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gguf.constants import VisionProjectorType

from mode_gguf.architectures.family import SAVED, Layout, ModelFamily, VisionTower
from mode_gguf.architectures.text import deepseek
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.architectures.vision import moon_vit
from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.checkpoint.folder import Checkpoint

TOKENIZER = Tokenizer("kimi-k2", tiktoken_model.KIMI_SPLIT)

_PROJECTOR = VisionProjectorType.KIMIVL
_RENAMES = (
    (r"^model\.mm_projector\.pre_norm\.", "multi_modal_projector.pre_norm."),
    (r"^model\.mm_projector\.in_proj\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.out_proj\.", "multi_modal_projector.linear_2."),
)


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """transformers' Kimi K2.5: config.json has other names for the same, and other models' for parts of it."""
    return moon_vit.model_config(checkpoint, deepseek.text_config(checkpoint))


FAMILY = ModelFamily(
    hf_class="KimiVLForConditionalGeneration",
    text=deepseek.TEXT_MODEL,
    vision=VisionTower(
        projector_type=_PROJECTOR,
        hparams=partial(moon_vit.tower_hparams, reader=_PROJECTOR),
        rules=moon_vit.rules({"attn_q": "q", "attn_k": "k", "attn_v": "v"}, moon_vit.flat_positions),
        keys=moon_vit.keys,
        check=moon_vit.check,
        place_image=partial(moon_vit.place_image, limit="in_token_limit"),
        needs_processor=False,
        image_token=moon_vit.image_token,
        plain_size=moon_vit.table_size,  # llama.cpp interpolates Kimi-VL's positions in another way
        token_types=None,
    ),
    tokenizer=TOKENIZER,
    layout=Layout((*moon_vit.RENAMES, *_RENAMES, *SAVED), moon_vit.read_parameter, model_config),
)
