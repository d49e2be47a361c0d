"""Q4_0: weight = d * (level - 8), levels of 4 bits, one d per 32 weights.

A block of 32 weights, `block_q4_0` of ggml:

| bytes | what                                                                       |
|-------|----------------------------------------------------------------------------|
| 0-1   | d, float16                                                                 |
| 2-17  | levels: byte 2 + m holds weights m (bits 0-3) and m + 16 (bits 4-7)        |
"""

from mode_gguf_kernels.block_scale import signed_block_kernels
from mode_gguf_kernels.levels import Field, Layout

KERNELS = signed_block_kernels("Q4_0", Layout(32, (Field(first=2, shift=0, n_bits=4, stride=16, weights=32),)))
