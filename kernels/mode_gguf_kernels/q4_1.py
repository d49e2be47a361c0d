"""Q4_1: weight = d * level + m, levels of 4 bits, a d and an m per 32 weights.

A block of 32 weights, `block_q4_1` of ggml:

| bytes | what                                                                       |
|-------|----------------------------------------------------------------------------|
| 0-1   | d, float16                                                                 |
| 2-3   | m, float16                                                                 |
| 4-19  | levels: byte 4 + n holds weights n (bits 0-3) and n + 16 (bits 4-7)        |
"""

from mode_gguf_kernels.block_min import min_block_kernels
from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.refine import Search

SEARCHES: dict[str, Search] = {
    "fast": Search(7, 0, 0, 2),
    "default": Search(13, 0, 0, 4),
    "max": Search(13, 0, 0, 10),
}

KERNELS = min_block_kernels("Q4_1", Layout(32, (Field(first=4, shift=0, n_bits=4, stride=16, weights=32),)), SEARCHES)
