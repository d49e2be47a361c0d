"""mode-gguf frontier: predicted damage at every size."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mode_gguf_cli import options
from mode_gguf_cli.console import progress, show, stdout

if TYPE_CHECKING:
    from mode_gguf.allocation.frontier import Frontier, FrontierPoint

WIDTH = 120
"""Of the table where it goes to a file, so that its lines stay whole."""


def command(
    model: options.Model,
    out: options.Out = None,
    preset: options.PresetOption = options.PresetName.MODE,
    types: options.MeasuredExpertTypes = None,
    dense_types: options.MeasuredDenseTypes = None,
    floor: options.Floors = None,
    points: Annotated[int, typer.Option(help="Budgets to solve, from the smallest file to the largest.", min=2)] = 20,
    png: Annotated[
        Path | None, typer.Option(help="Where the plot goes; default: frontier.png in the work folder.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show what damage is predicted at every size of MODEL's GGUF; writes frontier.json and frontier.png.

    Needs the results of `sensitivity` in the work folder and runs no model. With Fisher sensitivity, damage is the KL
    divergence of text and of image answers from full precision.
    """
    from mode_gguf import pipeline

    checkpoint, folder = pipeline.open_model(model, out, progress())
    candidates = options.measured_types(folder, types, dense_types, floor or ())
    plot = png or folder.frontier_plot
    with pipeline.folder_lock(folder):
        made = pipeline.run_frontier(
            checkpoint, folder, options.preset_of(preset), candidates, points=points, plot=plot
        )
    if json:
        show(made.model_dump_json(indent=2, exclude_none=True))
        return
    (stdout if stdout.is_terminal else Console(width=WIDTH)).print(_table(made))
    show(f"frontier  {folder.frontier}")
    show(f"plot      {plot}")


def _table(frontier: "Frontier") -> Table:
    """Planned and uniform points by size."""
    titles = ["cost"] if frontier.answers == ("cost",) else [f"{answer} KL" for answer in frontier.answers]
    table = Table("", box=None, title=f"predicted for {frontier.model}, preset {frontier.preset}", title_justify="left")
    for title in ("size", "bpw", *titles):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("types, % of experts' bytes")
    for point in sorted((*frontier.points, *frontier.uniform), key=lambda point: point.size_bytes):
        table.add_row(
            f"all {point.uniform}" if point.uniform else "planned",
            _size(point.size_bytes),
            f"{point.bpw:.3f}",
            *(f"{value:.3g}" for value in point.predicted),
            _shares(point),
        )
    return table


def _shares(point: "FrontierPoint") -> str:
    return ", ".join(f"{name} {100 * share:.0f}" for name, share in point.expert_shares.items())


def _size(size_bytes: int) -> str:
    unit, divisor = ("GiB", 2**30) if size_bytes >= 2**30 else ("MiB", 2**20)
    return f"{size_bytes / divisor:.2f} {unit}"
