"""What `bench_kernels` measured, as JSON, as Markdown tables and as a plot."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

POWERS = (0.0, 0.5, 1.0)
"""Exponents p of the error weights importance * (sigma^2 + x^2)^p; 0 is the importance alone, 0.5 ggml's objective."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Median speeds in million weights per second."""

    type_name: str
    mode: str
    importance: bool
    threads: int
    libggml: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.ours / self.libggml


@dataclass(frozen=True, slots=True)
class Error:
    """Squared error of what was packed, weighted for each of `POWERS`.

    Attributes:
        importance: whether it was packed with the importance; errors are always weighted by it.
        weights: name of the distribution.
        relative: weighted squared error over weighted squared weights.
        ratios: `relative` over that of the exact mode with importance.
    """

    type_name: str
    mode: str
    importance: bool
    weights: str
    relative: tuple[float, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """Median seconds a new process took in all, for its imports, and for its first calls of cached kernels."""

    type_name: str
    mode: str
    process: float
    imports: float
    first_calls: float


@dataclass(frozen=True, slots=True)
class Report:
    """All measurements of a run, and what they were made on."""

    processor: str
    lanes: int
    shape: tuple[int, int]
    repeats: int
    seed: int
    speeds: list[Speed] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    others: dict[str, float] = field(default_factory=dict)
    """Million weights per second of types that only libggml packs."""

    def write(self, folder: Path) -> None:
        """Write kernels.json, kernels.md and kernels.png into an existing folder."""
        stored = asdict(self)
        stored["speeds"] = [{**asdict(speed), "ratio": speed.ratio} for speed in self.speeds]
        stored["powers"] = POWERS
        (folder / "kernels.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        (folder / "kernels.md").write_text(self.markdown(), encoding="utf-8")
        self._plot(folder / "kernels.png")

    def markdown(self) -> str:
        """The tables, with a line on what they were made on."""
        made_on = f"{self.processor}, {self.lanes} lanes, {self.shape[0]} x {self.shape[1]} weights"
        speeds = [
            (s.type_name, s.mode, _yes(s.importance), s.threads, f"{s.libggml:.1f}", f"{s.ours:.1f}", f"{s.ratio:.1f}")
            for s in self.speeds
        ]
        errors = [
            (
                e.type_name,
                e.weights,
                e.mode,
                _yes(e.importance),
                f"{e.relative[1]:.3e}",
                *(f"{r:.3f}" for r in e.ratios),
            )
            for e in self.errors
        ]
        starts = [
            (s.type_name, s.mode, f"{s.process:.2f}", f"{s.imports:.2f}", f"{s.first_calls:.2f}") for s in self.starts
        ]
        ratios = [f"p = {power:g}" for power in POWERS]
        parts = [
            f"{made_on}, medians of {self.repeats}, seed {self.seed}",
            "## Speed, million weights per second",
            _table(("type", "mode", "importance", "threads", "libggml", "ours", "ratio"), speeds),
            "## Squared error weighted by importance (σ² + x²)^p, relative to exact with importance",
            _table(("type", "weights", "mode", "importance", "error / energy, p = 0.5", *ratios), errors),
            "## A new process with cached kernels, seconds",
            _table(("type", "mode", "process", "imports", "first pack and unpack"), starts),
        ]
        if self.others:
            parts.append("## Types packed by libggml, with importance, one thread, million weights per second")
            parts.append(_table(("type", "libggml"), [(name, f"{speed:.1f}") for name, speed in self.others.items()]))
        return "\n\n".join(parts) + "\n"

    def _plot(self, path: Path) -> None:
        """Packed with importance: speeds on the fewest threads, and errors for p = 0, mean over the distributions."""
        types = list(dict.fromkeys(speed.type_name for speed in self.speeds))
        threads = min(speed.threads for speed in self.speeds)
        shown = [speed for speed in self.speeds if speed.importance and speed.threads == threads]
        speed_bars = {"libggml": {speed.type_name: speed.libggml for speed in shown}}
        for speed in shown:
            speed_bars.setdefault(speed.mode, {})[speed.type_name] = speed.ours
        seen: dict[str, dict[str, list[float]]] = {}
        for error in self.errors:
            if error.importance:
                seen.setdefault(error.mode, {}).setdefault(error.type_name, []).append(error.ratios[0])
        error_bars = {name: {key: fmean(values) for key, values in found.items()} for name, found in seen.items()}

        figure = Figure(figsize=(12, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _bars(left, types, speed_bars)
        left.set(yscale="log", ylabel="million weights / s", title=f"Speed with importance, {threads} thread(s)")
        _bars(right, types, error_bars)
        right.axhline(1, color="black", linewidth=0.8)
        right.set(ylim=(0.8, 1.1), ylabel="relative to exact", title="Importance-weighted squared error")
        figure.savefig(path, dpi=120)


_COLOURS = {"libggml": "grey", "exact": "C0", "refined, fast": "C1", "refined": "C2", "refined, max": "C3"}
"""The same in both panels."""


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _bars(axes: Axes, types: Sequence[str], bars: dict[str, dict[str, float]]) -> None:
    """A group of bars per type, one per name."""
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        where = np.arange(len(types)) + (i - (len(bars) - 1) / 2) * width
        axes.bar(where, [values.get(type_name, 0.0) for type_name in types], width, label=name, color=_COLOURS[name])
    axes.set_xticks(range(len(types)), types)
    axes.legend(fontsize="small")
