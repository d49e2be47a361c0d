"""Q4_K: levels of 4 bits, scale and min of 6 bits per 32 weights; see `super_block_min`.

A super-block of 256 weights, `block_q4_K` of ggml:

| bytes  | what                                                                                  |
|--------|---------------------------------------------------------------------------------------|
| 0-1    | d, float16                                                                            |
| 2-3    | dmin, float16                                                                         |
| 4-15   | eight scales and eight mins of 6 bits, see `scale_min_k4`                                |
| 16-143 | levels: byte 32 h + m holds weights 64 h + m (bits 0-3) and 64 h + m + 32 (bits 4-7)  |
"""

from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.scale_min_k4 import pack_scales, unpack_scales, weigh_by_typical_size
from mode_gguf_kernels.super_block_min import Codes, GgmlSearch, min_super_block_kernels

KERNELS = min_super_block_kernels(
    "Q4_K",
    2 + 2 + 12 + 256 // 2,
    Layout(32, (Field(first=16, shift=0, n_bits=4, stride=32),)),
    Codes(63, pack_scales, unpack_scales, halves_word=0),
    GgmlSearch(2, weigh_by_typical_size, rmin=-1.0, nstep=20, use_mad=False, limits_plain=True, limits_weighted=False),
)
