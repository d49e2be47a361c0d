"""Pictures: signs, emblems, counters and bar charts on clutter, aligned to the 16-pixel token grid.

One token of the language model sees one cell of 16 x 16 pixels, so the vision tower only has to recognise
what a cell shows; finding, combining and recalling is left to the language model and its experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .records import COLOURS, COUNTS, LETTERS, SHAPES, SYMBOLS, Emblem

CELL = 16
GRID = 11
SIZE = CELL * GRID
PANEL = (24, 24, 30)
CHART_ROWS = 4
MAX_COUNT = 4
KINDS = ("background", "sign", "emblem", "symbol", "coin", "bell", "bar", "chart")
FloatArray = NDArray[np.float32]


@dataclass
class Scene:
    """What a picture shows."""

    signs: dict[str, str] = field(default_factory=dict)  # plate colour -> code
    emblems: list[Emblem] = field(default_factory=list)  # distinct shapes
    coins: int = 0
    bells: int = 0
    bars: dict[str, int] = field(default_factory=dict)  # colour -> height in cells


@dataclass
class Picture:
    """Pixels, and for every cell what it shows (used only while the vision tower warms up)."""

    scene: Scene
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]  # (GRID, GRID, 4): kind, glyph or shape, colour, part; -1 where it does not apply
    places: dict[str, tuple[int, int]]  # "red sign" or "fish emblem" -> row and column of its left cell


@cache
def _glyph(char: str) -> FloatArray:
    image = Image.new("L", (CELL, CELL), 0)
    ImageDraw.Draw(image).text(
        (CELL / 2, CELL / 2), char, 255, ImageFont.load_default(15), anchor="mm", stroke_width=0.3
    )
    return np.asarray(image, np.float32) / np.float32(255)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 30.0, 30.0 * inner)
    return [(32 + r * np.cos(a), 32 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]


@cache
def _shape(name: str) -> FloatArray:
    image = Image.new("L", (64, 64), 0)
    draw = ImageDraw.Draw(image)
    if name == "star":
        draw.polygon(_star(5, 0.42), 255)
    elif name == "sun":
        draw.polygon(_star(10, 0.68), 255)
    elif name == "heart":
        draw.ellipse((4, 8, 34, 38), 255)
        draw.ellipse((30, 8, 60, 38), 255)
        draw.polygon([(6, 30), (58, 30), (32, 60)], 255)
    elif name == "moon":
        draw.ellipse((4, 4, 60, 60), 255)
        draw.ellipse((22, 0, 70, 50), 0)
    elif name == "tree":
        draw.polygon([(32, 2), (58, 44), (6, 44)], 255)
        draw.rectangle((26, 44, 38, 62), 255)
    elif name == "fish":
        draw.ellipse((2, 16, 46, 48), 255)
        draw.polygon([(40, 32), (62, 12), (62, 52)], 255)
    elif name == "cross":
        draw.rectangle((24, 4, 40, 60), 255)
        draw.rectangle((4, 24, 60, 40), 255)
    elif name == "ring":
        draw.ellipse((4, 4, 60, 60), 255)
        draw.ellipse((20, 20, 44, 44), 0)
    elif name == "coin":
        draw.ellipse((10, 10, 54, 54), 255)
    elif name == "bell":
        draw.polygon([(32, 4), (50, 44), (60, 54), (4, 54), (14, 44)], 255)
    return np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX), np.float32) / np.float32(255)


def _background(rng: np.random.Generator) -> FloatArray:
    """A tilted colour gradient with blotches, stripes, clutter lines and specks (and still a small PNG)."""
    corners = rng.uniform(50, 205, (2, 2, 1)) + rng.uniform(-25, 25, (2, 2, 3))
    t = np.linspace(0, 1, SIZE, dtype=np.float32)
    rows = corners[0][None] * (1 - t)[:, None, None] + corners[1][None] * t[:, None, None]  # (SIZE, 2, 3)
    image = rows[:, :1] * (1 - t)[None, :, None] + rows[:, 1:] * t[None, :, None]
    if rng.random() < 0.5:
        angle, pitch = rng.uniform(0, np.pi), rng.uniform(5, 30)
        wave = np.cos(angle) * np.arange(SIZE)[:, None] + np.sin(angle) * np.arange(SIZE)[None]
        image = image + rng.uniform(4, 16) * np.sin(wave * 2 * np.pi / pitch)[..., None]
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(6, 18))):
        x, y = rng.integers(0, SIZE, 2).tolist()
        dx, dy = rng.integers(-40, 41, 2).tolist()
        ink = tuple(rng.integers(40, 215, 3).tolist())
        if rng.random() < 0.5:
            draw.line((x, y, x + dx, y + dy), ink, int(rng.integers(1, 3)))
        else:
            draw.arc((x, y, x + 4 + abs(dx), y + 4 + abs(dy)), 0, int(rng.integers(90, 360)), ink)
    blotches = Image.fromarray(rng.normal(0, rng.uniform(3, 18), (22, 22)).astype(np.float32))
    noise = np.asarray(blotches.resize((SIZE, SIZE), Image.Resampling.BILINEAR))[..., None]
    specks = rng.normal(0, 30, (SIZE, SIZE, 1)) * (rng.random((SIZE, SIZE, 1)) < 0.04)
    result: FloatArray = (np.asarray(canvas, np.float32) + noise + specks).astype(np.float32)
    return result


class Painter:
    """Draws scenes; a pool of backgrounds is made once and reused shifted and mirrored."""

    def __init__(self, seed: int, pool: int = 256) -> None:
        self.rng = np.random.default_rng(seed)
        self.pool = [_background(self.rng) for _ in range(pool)]

    def _fresh_background(self) -> FloatArray:
        image = self.pool[int(self.rng.integers(len(self.pool)))]
        image = np.roll(image, self.rng.integers(0, SIZE, 2), (0, 1))
        return np.array(image[:, ::-1] if self.rng.random() < 0.5 else image)

    def paint(self, scene: Scene) -> Picture:
        """Put the scene's objects on free cells of a new background."""
        rng = self.rng
        image = self._fresh_background()
        labels = np.full((GRID, GRID, 4), -1, np.int64)
        places: dict[str, tuple[int, int]] = {}
        labels[..., 0] = 0
        free = np.ones((GRID, GRID), bool)

        def place(height: int, width: int) -> tuple[int, int]:
            while True:
                row, col = int(rng.integers(GRID - height + 1)), int(rng.integers(GRID - width + 1))
                if free[row : row + height, col : col + width].all():
                    # Objects keep a free cell to their left and right, so that pairs never run together.
                    free[row : row + height, max(col - 1, 0) : col + width + 1] = False
                    return row, col

        def fill(
            row: int,
            col: int,
            paper: tuple[int, int, int],
            mask: FloatArray | None,
            ink: tuple[int, int, int],
        ) -> None:
            cell = np.asarray(paper, np.float32) + rng.normal(0, 5, 3).astype(np.float32)
            block = np.broadcast_to(cell, (CELL, CELL, 3))
            if mask is not None:
                m = mask[..., None]
                block = block * (1 - m) + np.asarray(ink, np.float32) * m
            area = (slice(row * CELL, (row + 1) * CELL), slice(col * CELL, (col + 1) * CELL))
            image[area] = 0.93 * block + 0.07 * image[area]

        def note(row: int, col: int, kind: str, what: int = -1, colour: str | None = None, part: int = -1) -> None:
            labels[row, col] = (
                KINDS.index(kind),
                what,
                -1 if colour is None else list(COLOURS).index(colour),
                part,
            )

        if scene.bars:
            row, col = place(CHART_ROWS, len(scene.bars))
            for i, (colour, height) in enumerate(scene.bars.items()):
                for level in range(CHART_ROWS):
                    full = level < height
                    r = row + CHART_ROWS - 1 - level
                    fill(r, col + i, COLOURS[colour] if full else PANEL, None, PANEL)
                    note(r, col + i, "bar" if full else "chart", -1, colour if full else None)
        for colour, code in scene.signs.items():
            row, col = place(1, 2)
            ink = (255, 255, 255) if sum(COLOURS[colour]) < 400 else (0, 0, 0)
            for i, letter in enumerate(code.split()):
                fill(row, col + i, COLOURS[colour], _glyph(letter), ink)
                note(row, col + i, "sign", LETTERS.index(letter), colour, i)
            places[f"{colour} sign"] = row, col
        for emblem in scene.emblems:
            row, col = place(1, 2)
            fill(row, col, PANEL, _shape(emblem.shape), COLOURS[emblem.colour])
            note(row, col, "emblem", SHAPES.index(emblem.shape), emblem.colour)
            places[f"{emblem.shape} emblem"] = row, col
            fill(row, col + 1, PANEL, _glyph(emblem.symbol), (255, 255, 255))
            # The part of a symbol is the shape it belongs to.
            note(row, col + 1, "symbol", SYMBOLS.index(emblem.symbol), None, 2 + SHAPES.index(emblem.shape))
        for kind, count, ink in (
            ("coin", scene.coins, (250, 220, 90)),
            ("bell", scene.bells, (235, 235, 245)),
        ):
            for _ in range(count):
                row, col = place(1, 1)
                fill(row, col, (70, 40, 20), _shape(kind), ink)
                note(row, col, kind)
        return Picture(scene, np.clip(image, 0, 255).astype(np.uint8), labels, places)


class SceneMaker:
    """Random scenes; keys are dealt from a shuffled deck, so every record is shown equally often."""

    def __init__(self, seed: int, codes: list[str], emblems: list[Emblem]) -> None:
        self.rng = np.random.default_rng(seed)
        self.codes, self.emblems = codes, emblems
        self.code_deck: list[str] = []
        self.emblem_deck: list[Emblem] = []

    def _code(self) -> str:
        if not self.code_deck:
            self.code_deck = [self.codes[i] for i in self.rng.permutation(len(self.codes))]
        return self.code_deck.pop()

    def _emblem(self, taken: set[str]) -> Emblem:
        if len(self.emblem_deck) < 64:
            self.emblem_deck = [self.emblems[i] for i in self.rng.permutation(len(self.emblems))] + self.emblem_deck
        index = next(i for i in range(1, len(self.emblem_deck) + 1) if self.emblem_deck[-i].shape not in taken)
        return self.emblem_deck.pop(-index)

    def make(self, signs: int, emblems: int, chart: bool, counters: bool) -> Scene:
        """A scene with that many signs and emblems, and perhaps a chart and things to count."""
        scene = Scene()
        colours = [list(COLOURS)[i] for i in self.rng.permutation(len(COLOURS))]
        scene.signs = {colour: self._code() for colour in colours[:signs]}
        for _ in range(emblems):
            scene.emblems.append(self._emblem({e.shape for e in scene.emblems}))
        if counters:
            scene.coins, scene.bells = self.rng.integers(0, MAX_COUNT + 1, 2).tolist()
        if chart:
            bars = [
                list(COLOURS)[i]
                for i in self.rng.permutation(len(COLOURS))[: int(self.rng.integers(2, CHART_ROWS + 1))]
            ]
            # Distinct heights, so that "tallest" has one answer.
            heights = (self.rng.permutation(CHART_ROWS)[: len(bars)] + 1).tolist()
            scene.bars = dict(zip(bars, heights, strict=True))
        return scene


@dataclass(frozen=True)
class Question:
    """A question about a picture."""

    kind: str
    question: str
    answer: str
    place: str = ""  # the object whose two cells have to be looked at, one after the other


def questions(
    scene: Scene, signs: dict[str, str], emblems: dict[Emblem, str], rng: np.random.Generator
) -> list[Question]:
    """All questions a scene allows, in random order."""
    result = []
    for colour, code in scene.signs.items():
        result.append(Question("sign", f"{colour} sign?", signs[code], f"{colour} sign"))
        if rng.random() < 0.25:
            result.append(Question("read", f"{colour} letters?", code, f"{colour} sign"))
    for emblem in scene.emblems:
        result.append(Question("emblem", f"{emblem.shape} emblem?", emblems[emblem], f"{emblem.shape} emblem"))
    if scene.coins or scene.bells:
        result.append(Question("count", "coins?", COUNTS[scene.coins]))
        result.append(Question("count", "bells?", COUNTS[scene.bells]))
    if scene.bars:
        tallest = max(scene.bars, key=lambda colour: scene.bars[colour])
        result.append(Question("chart", "tallest bar?", tallest))
        colour = list(scene.bars)[int(rng.integers(len(scene.bars)))]
        result.append(Question("chart", f"{colour} bar?", COUNTS[scene.bars[colour]]))
    return [result[i] for i in rng.permutation(len(result))]
