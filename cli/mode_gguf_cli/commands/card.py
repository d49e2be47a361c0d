"""mode-gguf card: the model card of a finished conversion."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    folder: options.Finished = Path(),
    repository: Annotated[
        str | None,
        typer.Option(
            "--repo",
            metavar="OWNER/NAME",
            help="Where it will be published, for the commands on the card; default: a place to fill in.",
            show_default=False,
        ),
    ] = None,
    base_model: options.BaseModel = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a README.md that was edited, or comes from elsewhere.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Write README.md into FOLDER: what the hub shows, how to run the files, what was measured, how they were made."""
    from mode_gguf import pipeline

    readme, card = pipeline.write_card(folder, repository, base_model=base_model, replace=replace, progress=progress())
    if json:
        emit_json({"card": str(readme), "text": card})
        return
    show(f"card     {readme}")
