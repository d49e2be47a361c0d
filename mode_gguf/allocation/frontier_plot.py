"""Draws a frontier; the only module here that loads matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mode_gguf.allocation.frontier import COST, Frontier
from mode_gguf.artifacts import replaced_atomically

TITLES = {
    "text": "KL of text answers (predicted, nats per token)",
    "image": "KL of image answers (predicted, nats per token)",
    "cost": "predicted cost",
}


def draw(frontier: Frontier, path: Path) -> None:
    """Write a PNG with a panel per predicted number over the size of the text model, atomically."""
    figure = Figure(figsize=(6.4 * len(frontier.answers), 4.8), layout="constrained")
    unit, divisor = ("GiB", 2**30) if frontier.highest_bytes >= 2**30 else ("MiB", 2**20)
    for index, answer in enumerate(frontier.answers):
        axes = figure.add_subplot(1, len(frontier.answers), index + 1)
        _draw_answer(axes, frontier, index, divisor)
        axes.set_xlabel(f"text model, {unit}")
        axes.set_ylabel(TITLES[answer])
    measure = "" if frontier.answers == COST else ", KL from full precision"
    figure.suptitle(f"{frontier.model}: preset {frontier.preset}, {frontier.sensitivity} sensitivity{measure}")
    with replaced_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_answer(axes: Axes, frontier: Frontier, index: int, divisor: int) -> None:
    """One panel: the curve, uniform types beside it, and the smallest size there is."""
    axes.plot(
        [point.size_bytes / divisor for point in frontier.points],
        [point.predicted[index] for point in frontier.points],
        marker=".",
        label="planned",
    )
    sizes = [point.size_bytes / divisor for point in frontier.uniform]
    predicted = [point.predicted[index] for point in frontier.uniform]
    axes.plot(sizes, predicted, linestyle="none", marker="D", color="tab:orange", label="experts all of one type")
    for point, x, y in zip(frontier.uniform, sizes, predicted, strict=True):
        axes.annotate(str(point.uniform), (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.axvline(frontier.lowest_bytes / divisor, color="gray", linestyle=":", label="smallest these types allow")
    if any(point.predicted[index] > 0 for point in (*frontier.points, *frontier.uniform)):
        axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
