"""GLM-4.5V and GLM-4.6V (106B-A12B): llama.cpp's `glm4moe` with a `glm4v` projector.

Blocks for multi-token prediction, which some checkpoints have behind the last layer, are left out: a forward of the
model gives no statistics of them, and without them the file says the same; llama.cpp cannot draft then.
"""

from mode_gguf.architectures.family import Layout, ModelFamily, says_tied_at_either_level
from mode_gguf.architectures.text import glm4_moe
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.architectures.vision import glm4v

TOKENIZER = Tokenizer(
    "glm4",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    special_tokens={"bos": "[gMASK]", "eot": "<|user|>", "eom": "<|observation|>", "unk": "<|endoftext|>"},
)


FAMILY = ModelFamily(
    hf_class="Glm4vMoeForConditionalGeneration",
    text=glm4_moe.TEXT_MODEL,
    vision=glm4v.TOWER,
    tokenizer=TOKENIZER,
    layout=Layout(tied=says_tied_at_either_level),
    ignored=("model.language_model.layers.{mtp}.",),
)
