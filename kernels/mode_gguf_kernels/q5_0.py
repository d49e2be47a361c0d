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

KERNELS = signed_block_kernels(
    "Q5_0",
    Layout(
        32,
        (
            Field(first=6, shift=0, n_bits=4, stride=16, weights=32),
            Field(first=2, shift=4, n_bits=1, stride=1, weights=32),
        ),
    ),
)
