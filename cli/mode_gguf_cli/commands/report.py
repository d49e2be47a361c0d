"""mode-gguf report: the page that people read."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, show


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Work folder of a conversion.", show_default=False)],
    samples: Annotated[
        Path | None,
        typer.Option(help="Held-out folder whose pictures are shown; default: the one it was validated with."),
    ] = None,
    allow_outside_samples: Annotated[
        bool,
        typer.Option("--allow-outside-samples", help="Show pictures, too, that the held-out folder names outside it."),
    ] = False,
    json: arguments.Json = False,
) -> None:
    """Draw report.html again from the files in FOLDER; nothing is computed but the frontier.

    One page without scripts that needs no network: quality, size, types, expert routing, sensitivity, timings. A part
    whose file is not there says so.
    """
    from mode_gguf import pipeline

    page = pipeline.run_report(folder, samples, outside=allow_outside_samples)
    if json:
        emit_json({"page": str(page)})
        return
    show(f"page      {page}")
