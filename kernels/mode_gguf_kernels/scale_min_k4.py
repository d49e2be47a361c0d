"""Eight scales and eight mins of 6 bits in twelve bytes, as Q4_K and Q5_K keep them (ggml's `get_scale_min_k4`):

| bytes | bits 0-3              | bits 4-5              | bits 6-7              |
|-------|-----------------------|-----------------------|-----------------------|
| 0-3   | scale j, bits 0-3     | scale j, bits 4-5     | scale j + 4, bits 4-5 |
| 4-7   | min j, bits 0-3       | min j, bits 4-5       | min j + 4, bits 4-5   |
| 8-11  | scale j + 4, bits 0-3 | min j + 4, bits 0-3 (in bits 4-7)            ||
"""

from mode_gguf_kernels.bits import byte_of
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.search import F, sum_of_squares
from mode_gguf_kernels.simd import Tile, absolute, load, splat, square_root, store

SCALES = 1
"""First 32-bit word of the twelve bytes, in both types."""


@device
def pack_scales(code: Tile, min_code: Tile, words: Tile) -> None:
    """Lay out eight scales and eight mins of 6 bits; what exceeds them spills as it does in C."""
    for group in range(3):
        word = splat(0)
        for j in range(4):
            if group == 0:
                byte = load(code, j) | ((load(code, j + 4) >> 4) << 6)
            elif group == 1:
                byte = load(min_code, j) | ((load(min_code, j + 4) >> 4) << 6)
            else:
                byte = (load(code, j + 4) & 15) | ((load(min_code, j + 4) & 15) << 4)
            word = word | ((byte & 255) << (8 * j))
        store(words, SCALES + group, word)


@device
def unpack_scales(words: Tile, code: Tile, min_code: Tile) -> None:
    """The inverse of `pack_scales`."""
    for j in range(4):
        scale_byte, min_byte = byte_of(words, SCALES, j), byte_of(words, SCALES, j + 4)
        low_bits = byte_of(words, SCALES, j + 8)
        store(code, j, scale_byte & 63)
        store(min_code, j, min_byte & 63)
        store(code, j + 4, (low_bits & 15) | ((scale_byte >> 6) << 4))
        store(min_code, j + 4, (low_bits >> 4) | ((min_byte >> 6) << 4))


@device
def weigh_by_typical_size(x: Tile, w: Tile) -> None:
    """w = root mean square of the sub-block's weights + |x|: both types' error weights where there is no importance."""
    for j in range(8):
        typical = square_root(sum_of_squares(x, 32 * j, 32) / F(32))
        for i in range(32 * j, 32 * j + 32):
            store(w, i, typical + absolute(load(x, i)))
