"""Conversion between float32 and float16, bit for bit as ggml does it on any x86-64 (`ggml_compute_fp32_to_fp16`, MIT
licence).
"""

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.simd import (
    Floats,
    Ints,
    absolute,
    bits_of,
    floats_from_bits,
    less_unsigned,
    select,
    shift_in_zeros,
    splat,
)

F = np.float32
_EXPONENT = np.int32(-0x01000000)  # 0xFF000000: sign and exponent of a float32 shifted left by one
_SIGN = np.int32(-0x80000000)


@device
def half_bits(value: Floats) -> Ints:
    """The bits of `value` in float16, nearest, ties to even; in the low 16 bits of each lane."""
    bits = bits_of(value)
    twice = bits + bits  # drops the sign
    bias = twice & _EXPONENT
    bias = select(less_unsigned(bias, 0x71000000), splat(0x71000000), bias)
    # Adding a power of two that is as much larger as float16 is coarser rounds the mantissa.
    scaled = (absolute(value) * F(2.0**112)) * F(2.0**-110)
    rounded = bits_of(floats_from_bits(shift_in_zeros(bias, 1) + 0x07800000) + scaled)
    magnitude = (shift_in_zeros(rounded, 13) & 0x7C00) + (rounded & 0xFFF)
    is_nan = less_unsigned(splat(_EXPONENT), twice)
    return (shift_in_zeros(bits, 16) & 0x8000) | select(is_nan, splat(0x7E00), magnitude)


@device
def half_value(bits: Ints) -> Floats:
    """The float32 value of float16 bits, of which the low 16 count."""
    high = bits << 16
    twice = high + high
    normal = floats_from_bits(shift_in_zeros(twice, 4) + 0x70000000) * F(2.0**-112)
    subnormal = floats_from_bits(shift_in_zeros(twice, 17) | 0x3F000000) - F(0.5)
    is_subnormal = less_unsigned(twice, 1 << 27)
    return floats_from_bits((high & _SIGN) | select(is_subnormal, bits_of(subnormal), bits_of(normal)))
