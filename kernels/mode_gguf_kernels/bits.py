"""Bit packing: small integers in the words of a block, the way ggml lays them out.

ggml's layouts are all of one kind: a byte holds values that stand `stride` apart, the first in its lowest bits. With
8 / n_bits = k values to a byte, each group of k * stride values fills stride bytes:

    byte[g * stride + m] = sum over j < k of field(value[g * k * stride + j * stride + m]) << (j * n_bits)
"""

from collections.abc import Callable

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.levels import Field
from mode_gguf_kernels.simd import Ints, Tile, load, shift_in_zeros, splat, store


@device
def pack_bits(values: Tile, count: int, shift: int, n_bits: int, stride: int, words: Tile, first_word: int) -> None:
    """Lay bits [shift, shift + n_bits) of values 0..count-1 out from word `first_word` on."""
    per_byte = 8 // n_bits
    mask = (1 << n_bits) - 1
    for i in range(count // (4 * per_byte)):
        word = splat(0)
        for byte in range(4):
            group, m = (4 * i + byte) // stride, (4 * i + byte) % stride
            for j in range(per_byte):
                value = load(values, (group * per_byte + j) * stride + m)
                word = word | (((value >> shift) & mask) << (8 * byte + j * n_bits))
        store(words, first_word + i, word)


@device
def unpack_bits(
    words: Tile, first_word: int, count: int, shift: int, n_bits: int, stride: int, adds: bool, values: Tile
) -> None:
    """The inverse of `pack_bits`: values 0..count-1 get bits [shift, shift + n_bits), beside those they have if `adds`,
    else alone.
    """
    per_byte = 8 // n_bits
    mask = (1 << n_bits) - 1
    for i in range(count // (4 * per_byte)):
        word = load(words, first_word + i)
        for byte in range(4):
            group, m = (4 * i + byte) // stride, (4 * i + byte) % stride
            for j in range(per_byte):
                item = (group * per_byte + j) * stride + m
                field = ((word >> (8 * byte + j * n_bits)) & mask) << shift
                store(values, item, load(values, item) | field if adds else field)


@device
def byte_of(words: Tile, first_word: int, i: int) -> Ints:
    """Byte i after word `first_word`, as 0..255."""
    return (load(words, first_word + i // 4) >> (8 * (i % 4))) & 255


@device
def after_half(half: Ints, payload: Tile, count: int, words: Tile) -> None:
    """A block of 16 bits and then `count` whole words."""
    low = half
    for i in range(count):
        word = load(payload, i)
        store(words, i, low | (word << 16))
        low = shift_in_zeros(word, 16)
    store(words, count, low)


@device
def without_half(words: Tile, count: int, payload: Tile) -> None:
    """The inverse of `after_half`, but for the 16 bits."""
    for i in range(count):
        store(payload, i, shift_in_zeros(load(words, i), 16) | (load(words, i + 1) << 16))


def field_packer(fields: tuple[Field, ...], start: int = 0) -> Callable[[Tile, Tile], None]:
    """A device function pack(values, words) that lays values out in all fields; `words` begins at byte `start`."""
    first, shift, n_bits, stride, count = fields[0]
    first_word = (first - start) // 4

    @device
    def pack_field(values: Tile, words: Tile) -> None:
        pack_bits(values, count, shift, n_bits, stride, words, first_word)

    if len(fields) == 1:
        return pack_field
    pack_others = field_packer(fields[1:], start)

    @device
    def pack_fields(values: Tile, words: Tile) -> None:
        pack_field(values, words)
        pack_others(values, words)

    return pack_fields


def field_unpacker(fields: tuple[Field, ...], start: int = 0) -> Callable[[Tile, Tile], None]:
    """A device function unpack(words, values), the inverse of `field_packer`'s."""
    first, shift, n_bits, stride, count = fields[0]
    first_word = (first - start) // 4
    if len(fields) == 1:

        @device
        def unpack_field(words: Tile, values: Tile) -> None:
            unpack_bits(words, first_word, count, shift, n_bits, stride, False, values)

        return unpack_field
    unpack_others = field_unpacker(fields[1:], start)

    @device
    def unpack_fields(words: Tile, values: Tile) -> None:
        unpack_others(words, values)
        unpack_bits(words, first_word, count, shift, n_bits, stride, True, values)

    return unpack_fields
