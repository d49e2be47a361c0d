"""Mistral Small 4 (119B): llama.cpp's `mistral4` with a `pixtral` projector, in both layouts of its names.

Its class, Mistral3ForConditionalGeneration, also has the dense Mistral Small 3 and Ministral 3, which are refused.
"""

from dataclasses import replace
from functools import partial

from mode_gguf.architectures.family import SAVED, Layout, ModelFamily, says_tied
from mode_gguf.architectures.text import mistral4
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.architectures.vision import pixtral

TOKENIZER = Tokenizer(
    "tekken",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


PARAMETERS = ModelFamily(
    hf_class="Mistral3ForConditionalGeneration",
    text=mistral4.TEXT_MODEL,
    vision=pixtral.TOWER,
    tokenizer=TOKENIZER,
    layout=Layout(tied=partial(says_tied, default=True)),
)
"""Checkpoints with the names of transformers' parameters."""

FAMILY = replace(PARAMETERS, layout=replace(PARAMETERS.layout, renames=SAVED))
"""Checkpoints as they are published, and as transformers saves them."""
