"""Arguments and options of commands that are no part of a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf.options import OUTPUT, RUN

_MODEL_HELP = "Folder of the Hugging Face checkpoint, or its name on the hub: ORG/NAME or ORG/NAME@REVISION."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"{_MODEL_HELP} Not needed with --base-gguf and --calibration-from.",
        show_default=False,
    ),
]
Finished = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Work folder of a finished conversion.", show_default="the current folder"),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Work folder for everything written; default: <model name>-mode-gguf in the current folder.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Plan to follow; default: plan.json in the work folder.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.", rich_help_panel=RUN)
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        help="Folder of your llama.cpp tools; default: MODE_GGUF_LLAMA_CPP, then PATH, then the embedded build.",
        show_default=False,
    ),
]
