"""Q5_1: weight = d * level + m, levels of 5 bits, a d and an m per 32 weights.

A block of 32 weights, `block_q5_1` of ggml:

| bytes | what                                                                                  |
|-------|---------------------------------------------------------------------------------------|
| 0-1   | d, float16                                                                            |
| 2-3   | m, float16                                                                            |
| 4-7   | levels, bit 4: bit i of the 32 belongs to weight i                                    |
| 8-23  | levels, bits 0-3: byte 8 + n holds weights n (bits 0-3) and n + 16 (bits 4-7)         |
"""

from mode_gguf_kernels.block_min import min_block_kernels
from mode_gguf_kernels.blocks import SEARCHES
from mode_gguf_kernels.levels import Field, Layout

KERNELS = min_block_kernels(
    "Q5_1",
    Layout(
        32,
        (
            Field(first=8, shift=0, n_bits=4, stride=16, weights=32),
            Field(first=4, shift=4, n_bits=1, stride=1, weights=32),
        ),
    ),
    SEARCHES,
)
