"""Gemma 4 MoE (26B-A4B): llama.cpp's `gemma4` with a `gemma4v` projector.

Only the variant with experts is supported: the dense ones need no tool of this kind. An audio tower
(`model.audio_tower.*`) is left out: the file answers about text and pictures.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mode_gguf.architectures.family import Layout, ModelFamily, says_tied
from mode_gguf.architectures.text import gemma4
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.architectures.vision import gemma4 as gemma4_vision
from mode_gguf.checkpoint.folder import Checkpoint

TOKENIZER = Tokenizer(
    "gemma4",
    model="gemma4",
    visible=frozenset(
        {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
    ),
    defaults={"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
)


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json without the audio tower, whose weights nobody needs."""
    return {**checkpoint.config, "audio_config": None}


FAMILY = ModelFamily(
    hf_class="Gemma4ForConditionalGeneration",
    text=gemma4.TEXT_MODEL,
    vision=gemma4_vision.TOWER,
    tokenizer=TOKENIZER,
    layout=Layout(model_config=model_config, tied=partial(says_tied, default=True)),
    ignored=("model.audio_tower.", "model.embed_audio."),
)
