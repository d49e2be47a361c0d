"""mode-gguf run: a GGUF file in the llama.cpp that can load it."""

import os
import shlex
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import say


class Tool(StrEnum):
    """llama.cpp's programs that take a model."""

    SERVER = "llama-server"
    MTMD_CLI = "llama-mtmd-cli"
    BENCH = "llama-bench"
    PERPLEXITY = "llama-perplexity"


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Text GGUF.", show_default=False)],
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- EXTRA...", help="What else the program is given, as it is.", show_default=False),
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="The model's projector, for pictures.")] = None,
    tool: Annotated[Tool, typer.Option(help="The program to start.")] = Tool.SERVER,
    llama_cpp: options.LlamaCpp = None,
) -> None:
    """Start a llama.cpp program with MODEL, in the place of this one.

    Files with one type per expert need the build that `mode-gguf runtime build` makes; others run in your llama.cpp.
    """
    from mode_gguf.validation.launch import command_line

    line = command_line(model, tool.value, mmproj, extra or (), llama_cpp)
    say(shlex.join(line).replace("[", r"\["))
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # its exec returns to the shell at once and leaves the program without a console
        raise typer.Exit(subprocess.run(line, check=False).returncode)
    os.execv(line[0], line)
