"""The colour scale of reports, safe for colour blindness: viridis from little to much, and white for no value."""

import math

from mode_gguf.quantization.types import QUANT_TYPES

Rgb = tuple[int, int, int]

RAMP: tuple[Rgb, ...] = tuple(
    (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16))
    for code in ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
)
"""matplotlib's viridis at nine places; lightness rises evenly, so that it reads in grey, too."""
NEVER: Rgb = (255, 255, 255)
"""No value at all: lighter than much, and the only one without a hue."""
PLAIN: Rgb = (142, 150, 160)
"""Colour of types that are not packed."""
_FEWEST, _MOST = 2.0, 9.0  # bits per weight at the ends of the ramp
_DARK_BELOW = 0.18


def ramp(position: float) -> Rgb:
    """The colour at 0 (dark, little) to 1 (light, much); what is outside counts as the end."""
    place = min(max(position, 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    part = place - index
    first, second = RAMP[index], RAMP[index + 1]
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def type_colour(name: str) -> Rgb:
    """A type's colour: lighter the more bits; float types that nothing is packed in are grey."""
    bits = QUANT_TYPES[name].bits_per_weight
    if bits > _MOST:
        return PLAIN
    return ramp(math.log(bits / _FEWEST) / math.log(_MOST / _FEWEST))


def text_colour(background: Rgb) -> str:
    """Colour of text that can be read on a background."""
    return "#fff" if _luminance(background) < _DARK_BELOW else "#111"


def css(colour: Rgb) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _luminance(colour: Rgb) -> float:
    """Relative luminance as WCAG defines it, 0 to 1."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
