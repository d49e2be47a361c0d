"""mode-gguf frontier: predicted damage at every size."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mode_gguf.options import OUTPUT
from mode_gguf.recipe import Recipe
from mode_gguf.sizes import binary_size
from mode_gguf_cli import arguments
from mode_gguf_cli.console import cell, progress, show, stdout
from mode_gguf_cli.generated import with_recipe

if TYPE_CHECKING:
    from mode_gguf.allocation.frontier import Frontier, FrontierPoint

WIDTH = 120
"""Terminal width for the table in a file, so that its lines stay whole."""


@with_recipe("sensitivity")
def command(
    recipe: Recipe,
    model: arguments.Model,
    out: arguments.Out = None,
    points: Annotated[
        int,
        typer.Option(help="Budgets to solve, from the smallest file to the largest.", min=2, rich_help_panel=OUTPUT),
    ] = 20,
    json: arguments.Json = False,
) -> None:
    """Show what damage is predicted at every size of MODEL's GGUF; writes frontier.json and frontier.svg.

    Needs the results of `sensitivity` in the work folder and runs no model. With Fisher sensitivity, damage is the KL
    divergence of text and of image answers from full precision.
    """
    from mode_gguf import pipeline
    from mode_gguf.allocation.presets import preset_of

    run = pipeline.open_model(model, out, recipe, progress())
    candidates = pipeline.measured_candidates(recipe, run.folder)
    with pipeline.folder_lock(run.folder):
        made = pipeline.make_frontier(run, preset_of(recipe), candidates, points)
    if json:
        show(made.model_dump_json(indent=2, exclude_none=True))
        return
    (stdout if stdout.is_terminal else Console(width=WIDTH)).print(_table(made))
    show(f"frontier  {run.folder.frontier}")
    show(f"plot      {run.folder.frontier_plot}")


def _table(frontier: "Frontier") -> Table:
    """Planned and uniform points by size."""
    titles = ["cost"] if frontier.answers == ("cost",) else [f"{answer} KL" for answer in frontier.answers]
    above = cell(f"predicted for {frontier.model}, preset {frontier.preset}")
    table = Table("", box=None, title=above, title_justify="left")
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
    return binary_size(size_bytes, 2)
