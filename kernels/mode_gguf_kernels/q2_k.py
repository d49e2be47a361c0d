"""Q2_K: weight = d * scale * level - dmin * min, levels of 2 bits, scale and min of 4 bits per 16 weights.

A super-block of 256 weights, `block_q2_K` of ggml:

| bytes  | what                                                                                            |
|--------|-------------------------------------------------------------------------------------------------|
| 0-15   | byte j: sub-block j's scale (bits 0-3) and min (bits 4-7)                                       |
| 16-79  | levels: byte 32 h + m holds weights 128 h + m, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7      |
| 80-81  | d, float16                                                                                      |
| 82-83  | dmin, float16                                                                                   |
"""

from mode_gguf_kernels.bits import byte_of, pack_bits
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.simd import Tile, absolute, load, store
from mode_gguf_kernels.super_block_min import Codes, GgmlSearch, min_super_block_kernels


@device
def store_codes(code: Tile, min_code: Tile, words: Tile) -> None:
    """Lay out sixteen scales and mins of 4 bits."""
    for j in range(16):
        store(code, j, load(code, j) | (load(min_code, j) << 4))
    pack_bits(code, 16, 0, 8, 16, words, 0)


@device
def load_codes(words: Tile, code: Tile, min_code: Tile) -> None:
    """The inverse of `store_codes`."""
    for j in range(16):
        both = byte_of(words, 0, j)
        store(code, j, both & 15)
        store(min_code, j, both >> 4)


@device
def weigh(x: Tile, w: Tile) -> None:
    """w = |x|."""
    for i in range(256):
        store(w, i, absolute(load(x, i)))


KERNELS = min_super_block_kernels(
    "Q2_K",
    256 // 16 + 256 // 4 + 2 + 2,
    Layout(16, (Field(first=16, shift=0, n_bits=2, stride=32),)),
    Codes(15, store_codes, load_codes, halves_word=20),
    GgmlSearch(1, weigh, rmin=-0.5, nstep=15, use_mad=True, limits_plain=False, limits_weighted=False),
)
