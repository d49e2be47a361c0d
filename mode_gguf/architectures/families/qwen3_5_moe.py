"""Qwen3.5-MoE and Qwen3.6-MoE (35B-A3B, 122B-A10B, 397B-A17B): llama.cpp's `qwen35moe` with a `qwen3vl_merger`."""

from mode_gguf.architectures.family import ModelFamily
from mode_gguf.architectures.text import qwen3_5_moe
from mode_gguf.architectures.tokenizer import QWEN_DEFAULTS, Tokenizer
from mode_gguf.architectures.vision import qwen

TOKENIZER = Tokenizer(
    "qwen35",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    normalizer="NFC",
    defaults=QWEN_DEFAULTS,
)

FAMILY = ModelFamily(
    hf_class="Qwen3_5MoeForConditionalGeneration",
    text=qwen3_5_moe.TEXT_MODEL,
    vision=qwen.TOWER,
    tokenizer=TOKENIZER,
    ignored=("mtp.",),
)
