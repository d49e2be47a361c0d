"""Mistral Small 4 (119B): llama.cpp's `mistral4` with a `pixtral` projector, in both layouts of its names.

Its class, Mistral3ForConditionalGeneration, also has the dense Mistral Small 3 and Ministral 3, which are refused.
"""

from dataclasses import replace
from functools import partial

from mode_gguf.architectures.family import SAVED, Layout, ModelFamily, config_with_tied
from mode_gguf.architectures.text import mistral4
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.architectures.vision import pixtral
from mode_gguf.checkpoint.folder import Checkpoint

TOKENIZER = Tokenizer(
    "tekken",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the token embedding: transformers ties by default, but not a head that is stored."""
    if {"lm_head.weight", "language_model.lm_head.weight"} & checkpoint.tensors.keys():
        return False
    return bool(checkpoint.config.get("tie_word_embeddings", True))


PARAMETERS = ModelFamily(
    hf_class="Mistral3ForConditionalGeneration",
    text=mistral4.TEXT_MODEL,
    vision=pixtral.TOWER,
    tokenizer=TOKENIZER,
    layout=Layout(model_config=partial(config_with_tied, tied=is_tied), tied=is_tied),
)
"""Checkpoints with the names of transformers' parameters."""

FAMILY = replace(PARAMETERS, layout=replace(PARAMETERS.layout, renames=SAVED))
"""Checkpoints as they are published, and as transformers saves them."""
