"""Q5_0: weight = d * (level - 16), levels of 5 bits, one d per 32 weights.

A block of 32 weights, `block_q5_0` of ggml:

| bytes | what                                                                                  |
|-------|---------------------------------------------------------------------------------------|
| 0-1   | d, float16                                                                            |
| 2-5   | levels, bit 4: bit i of the 32 belongs to weight i                                    |
| 6-21  | levels, bits 0-3: byte 6 + m holds weights m (bits 0-3) and m + 16 (bits 4-7)         |
"""

from mode_gguf_kernels.block_scale import signed_block_kernels
from mode_gguf_kernels.levels import Field, Layout

KERNELS = signed_block_kernels("Q5_0", Layout(32, (Field(6, 0, 4, 16, 32), Field(2, 4, 1, 1, 32))))
