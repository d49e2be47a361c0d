"""The frontier as SVG: damage over size, this file on it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from mode_gguf.validation.conversion_record import SizePoint

WIDTH, HEIGHT = 400, 300
"""Size of the chart, in units that are pixels on a phone; letters grow with it on larger screens."""
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40
_TITLE = 22
"""Height of a line of text above a chart in an SVG file of its own."""
_STYLE = (
    "text{font-family:sans-serif}.grid{stroke:#dde2e8}.tick,.note,.title{font-size:11px;fill:#5b6776}"
    ".head{font-size:14px;fill:#16202c}.line{fill:none;stroke:#1a5fb4;stroke-width:2}.dot{fill:#1a5fb4}"
    ".uniform{fill:#5b6776}"
)
"""The colours of style.css's light scheme."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A highlighted point: its label for screen readers, and its class in the style sheet."""

    size_bytes: float
    value: float
    label: str
    kind: str


def frontier_chart(
    planned: Sequence[SizePoint], uniform: Sequence[SizePoint], index: int, marks: Sequence[Mark]
) -> Markup:
    """A line through the planned points, diamonds for uniform types, `marks` on top; damage on a logarithmic scale.

    Args:
        index: which of the predicted numbers is drawn. Points without one, or of no damage, are left out.
    """
    line = [(point.size_bytes, _value(point, index)) for point in planned if _value(point, index) > 0]
    diamonds = [point for point in uniform if _value(point, index) > 0]
    every = [*line, *((p.size_bytes, _value(p, index)) for p in diamonds), *((m.size_bytes, m.value) for m in marks)]
    if not line:
        return Markup("")
    axes = _Axes.around(every)
    parts = [
        *axes.drawn(),
        f'<polyline class="line" points="{" ".join(axes.at(*point) for point in line)}"/>',
        *(f'<circle class="dot" cx="{axes.x(size):.1f}" cy="{axes.y(value):.1f}" r="2.5"/>' for size, value in line),
    ]
    for point in diamonds:
        x, y = axes.x(point.size_bytes), axes.y(_value(point, index))
        parts.append(f'<path class="uniform" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5-5z"/>')
        parts.append(f'<text class="note" x="{x + 7:.1f}" y="{y - 5:.1f}">{escape(point.name)}</text>')
    for mark in marks:
        x, y = axes.x(mark.size_bytes), axes.y(mark.value)
        shape = f'<circle class="{mark.kind}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>'
        parts.append(f"<g>{shape}<title>{escape(mark.label)}</title></g>")
    return Markup("".join(parts))  # every part is made of numbers and of what was escaped


def frontier_svg(planned: Sequence[SizePoint], uniform: Sequence[SizePoint], answers: Sequence[str], title: str) -> str:
    """An SVG file with a chart per kind of answer, side by side.

    Args:
        answers: kinds of answers of the predicted numbers, in their order.
    """
    width, height = WIDTH * len(answers), HEIGHT + 2 * _TITLE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="head" x="{width / 2}" y="{_TITLE - 6}" text-anchor="middle">{escape(title)}</text>',
    ]
    for index, answer in enumerate(answers):
        drawing = frontier_chart(planned, uniform, index, ())
        kind = escape(answer)
        name = "predicted cost" if answer == "cost" else f"KL of {kind} answers, predicted, nats per token"
        parts.append(f'<g transform="translate({index * WIDTH} {2 * _TITLE})">')
        parts.append(f'<text class="title" x="{WIDTH / 2}" y="-4" text-anchor="middle">{name}</text>{drawing}</g>')
    return "".join([*parts, "</svg>\n"])


def _value(point: SizePoint, index: int) -> float:
    return point.predicted[index] if point.predicted else math.nan


@dataclass(frozen=True, slots=True)
class _Axes:
    """Chart axes: linear in size, logarithmic in damage."""

    smallest: float
    largest: float
    lowest: float
    highest: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> "_Axes":
        sizes, logs = [size for size, _ in points], [math.log10(value) for _, value in points]
        margin = 0.04 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
        space = 0.06 * (max(logs) - min(logs)) or 0.5
        return cls(min(sizes) - margin, max(sizes) + 2 * margin, min(logs) - space, max(logs) + space)

    def x(self, size: float) -> float:
        return LEFT + (size - self.smallest) / (self.largest - self.smallest) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        part = (math.log10(value) - self.lowest) / (self.highest - self.lowest)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def at(self, size: float, value: float) -> str:
        return f"{self.x(size):.1f},{self.y(value):.1f}"

    def drawn(self) -> Iterator[str]:
        for value in self._value_ticks():
            y = self.y(value)
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        unit, divisor = ("GB", 1e9) if self.largest >= 1e9 else ("MB", 1e6)
        for size in _round_steps(self.smallest / divisor, self.largest / divisor):
            x = self.x(size * divisor)
            yield f'<line class="grid" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="{x:.1f}" x2="{x:.1f}"/>'
            yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{size:g}</text>'
        middle = (LEFT + WIDTH - RIGHT) / 2
        title = f"size of all tensors, {unit}"
        yield f'<text class="title" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{title}</text>'

    def _value_ticks(self) -> Iterator[float]:
        """1, 2 and 5 times powers of ten for up to three decades, else powers alone."""
        decades = range(math.floor(self.lowest), math.ceil(self.highest) + 1)
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        for decade in decades:
            for step in steps:
                value = step * 10.0**decade
                if self.lowest <= math.log10(value) <= self.highest:
                    yield float(f"{value:.12g}")


def _round_steps(lowest: float, highest: float) -> Iterator[float]:
    """Four to eight round numbers between the two."""
    rough = (highest - lowest) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1):
        yield float(f"{number * step:.12g}")
