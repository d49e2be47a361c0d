"""mode-gguf recipe: all options of a conversion, with what they mean."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf.options import OUTPUT
from mode_gguf.recipe import Recipe, commented_lines
from mode_gguf_cli.console import show
from mode_gguf_cli.generated import with_recipe


@with_recipe()
def command(
    recipe: Recipe,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Write it to a file.", show_default=False, rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Print the recipe of a preset: every option there is, its default and what it means, as YAML.

    Keep what you change and give the file to any command with --recipe; what is left out is as in the preset.
    """
    if out is not None:
        recipe.save(out)
        show(f"recipe   {out}")
        return
    for line in commented_lines(recipe):
        show(line)
