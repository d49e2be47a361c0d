"""Qwen3-VL-MoE (30B-A3B, 235B-A22B): llama.cpp's `qwen3vlmoe` with a `qwen3vl_merger` projector."""

from mode_gguf.architectures.family import ModelFamily
from mode_gguf.architectures.text import qwen3_vl_moe
from mode_gguf.architectures.tokenizer import QWEN2
from mode_gguf.architectures.vision import qwen
from mode_gguf.gpu_memory.qwen3_vl_moe import GRAPHS

FAMILY = ModelFamily(
    hf_class="Qwen3VLMoeForConditionalGeneration",
    text=qwen3_vl_moe.TEXT_MODEL,
    vision=qwen.TOWER,
    tokenizer=QWEN2,
    memory_graphs=GRAPHS,
)
