"""Results of bench_quality.py: kept on disk one by one, and made into a table and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import matplotlib as mpl

from mode_gguf.validation.report import ValidationReport


@dataclass(frozen=True, slots=True)
class Result:
    """One file: what it was made by, at the size of which mix, and what llama.cpp says about it.

    `key` tells files of equal contents; KLs are in nats per token, `right` is of `asked` questions about pictures.
    """

    mix: str
    contestant: str
    seed: int
    key: str
    size_bytes: int
    bpw: float
    text: float
    image: float
    text_p999: float
    image_p999: float
    text_top1: float
    image_top1: float
    right: int
    asked: int

    @staticmethod
    def of(mix: str, contestant: str, seed: int, key: str, file: Path, report: ValidationReport) -> "Result":
        text, image = report.text, report.image
        if text is None or image is None:
            raise SystemExit("the held-out set needs texts and questions about pictures")
        accuracy = report.accuracy["all"]
        return Result(
            mix,
            contestant,
            seed,
            key,
            size_bytes=file.stat().st_size,
            bpw=report.candidate.bpw,
            text=_known(text.kl_mean),
            image=_known(image.kl_mean),
            text_p999=_known(text.kl_p99_9),
            image_p999=_known(image.kl_p99_9),
            text_top1=_known(text.top1_agreement),
            image_top1=_known(image.top1_agreement),
            right=accuracy.right,
            asked=accuracy.asked,
        )


def _known(value: float | None) -> float:
    if value is None:
        raise SystemExit("results need a reference to compare with")
    return value


class Results:
    """The results of a folder; a file of them is read once and written after every addition."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results = [Result(**one) for one in json.loads(path.read_text())] if path.exists() else []

    def all(self) -> list[Result]:
        """Everything measured so far."""
        return list(self._results)

    def has(self, mix: str, contestant: str, seed: int) -> bool:
        """Whether this has been measured."""
        return any((one.mix, one.contestant, one.seed) == (mix, contestant, seed) for one in self._results)

    def size(self, mix: str) -> int:
        """Bytes of the stock file of a mix."""
        return next(one.size_bytes for one in self._results if one.mix == mix and one.contestant.startswith("stock"))

    def equal_file(self, key: str) -> Result | None:
        """A result of a file with the same contents."""
        return next((one for one in self._results if one.key == key), None)

    def add(self, result: Result) -> None:
        """Keep a result."""
        self._results.append(result)
        self._path.write_text(json.dumps([asdict(one) for one in self._results], indent=1) + "\n")
        print(result, flush=True)


@dataclass(frozen=True, slots=True)
class Cell:
    """A contestant at one size: medians over the seeds, and their smallest and largest values."""

    results: tuple[Result, ...]

    def median(self, what: str) -> float:
        """Median over the seeds of one of the result's fields."""
        return float(median(getattr(one, what) for one in self.results))

    def spread(self, what: str) -> tuple[float, float]:
        """Smallest and largest."""
        values = [getattr(one, what) for one in self.results]
        return min(values), max(values)


def cells(results: Sequence[Result]) -> dict[tuple[str, str], Cell]:
    """By mix and contestant, in the order they were measured."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for one in results:
        grouped.setdefault((one.mix, one.contestant), []).append(one)
    return {key: Cell(tuple(group)) for key, group in grouped.items()}


def write_report(results: Sequence[Result], name: str, folder: Path, ours: str, stock: tuple[str, ...]) -> None:
    """Write `quality-<name>.md` and `quality-<name>.png` to `folder`."""
    table = cells(results)
    mixes = list(dict.fromkeys(one.mix for one in results))
    lines = [
        f"# {name}: every contestant at the sizes of the stock mixes",
        "",
        "KL in nats per token, medians over the seeds (smallest to largest); against ours: the change of the medians,",
        "text / image. `experiments/bench_quality.py` says what each contestant is.",
    ]
    for mix in mixes:
        mine = table[mix, ours]
        lines += ["", f"## {mix}: {mine.median('size_bytes') / 1e6:.3f} MB, {mine.median('bpw'):.3f} bpw", ""]
        lines += [
            "| | text KL | image KL | against ours | 99.9th percentile | same top-1 | right | size |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = [(contestant, cell) for (at, contestant), cell in table.items() if at == mix]
        lines += [
            _row(contestant, cell, mine) for contestant, cell in sorted(rows, key=lambda row: row[1].median("text"))
        ]
        best = {what: min(table[mix, one].median(what) for one in stock) for what in ("text", "image")}
        ratios = [mine.median(what) / best[what] for what in ("text", "image")]
        lines += ["", f"Ours over the better stock file: text {ratios[0]:.2f}, image {ratios[1]:.2f}."]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"quality-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(table, mixes, ours, stock, folder / f"quality-{name}.png")


def _row(contestant: str, cell: Cell, mine: Cell) -> str:
    def pair(what: str, form: str, scale: float = 1.0) -> str:
        return " / ".join(f"{scale * cell.median(f'{kind}_{what}'):{form}}" for kind in ("text", "image"))

    def kl(what: str) -> str:
        low, high = cell.spread(what)
        return f"{cell.median(what):.4f} ({low:.4f} to {high:.4f})"

    change = " / ".join(f"{100 * (cell.median(what) / mine.median(what) - 1):+.0f} %" for what in ("text", "image"))
    size = f"{100 * (cell.median('size_bytes') / mine.median('size_bytes') - 1):+.1f} %"
    right = f"{cell.median('right'):.0f} of {cell.results[0].asked}"
    return (
        f"| {contestant} | {kl('text')} | {kl('image')} | {'' if cell is mine else change} | {pair('p999', '.3f')} | "
        f"{pair('top1', '.1f', 100)} % | {right} | {size} |"
    )


def draw(
    table: dict[tuple[str, str], Cell], mixes: Sequence[str], ours: str, stock: tuple[str, ...], path: Path
) -> None:
    """KL over size, text and image apart: ours, both kinds of stock files, and every other contestant in grey."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    contestants = list(dict.fromkeys(contestant for _, contestant in table))
    first_other = next((one for one in contestants if one not in (ours, *stock)), None)
    colours = {ours: "tab:red", **dict(zip(stock, ("tab:blue", "tab:cyan"), strict=True))}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axis, what in zip(axes, ("text", "image"), strict=True):
        for contestant in sorted(contestants, key=lambda one: one in colours):
            measured = [table[mix, contestant] for mix in mixes if (mix, contestant) in table]
            values = [cell.median(what) for cell in measured]
            error = [
                [value - cell.spread(what)[0] for value, cell in zip(values, measured, strict=True)],
                [cell.spread(what)[1] - value for value, cell in zip(values, measured, strict=True)],
            ]
            named = contestant in colours
            axis.errorbar(
                [cell.median("size_bytes") / 1e6 for cell in measured],
                values,
                error,
                fmt="o-" if named else ".",
                color=colours.get(contestant, "lightgrey"),
                label=contestant if named else "every other way" if contestant == first_other else None,
                capsize=3,
            )
        axis.set(title=what, xlabel="file, MB", ylabel="KL divergence from BF16, nats per token", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
