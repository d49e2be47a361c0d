"""mode-gguf run: a finished model in the llama.cpp that can load it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mode_gguf.options import SERVING, ServingOptions
from mode_gguf.plain_text import printable, shell_line, shell_word
from mode_gguf_cli.console import say, show
from mode_gguf_cli.generated import with_options

if TYPE_CHECKING:
    from mode_gguf.pipeline import ModelFiles

_QUESTION = "What is in this picture?"


@with_options("serving", ServingOptions)
def command(
    serving: ServingOptions,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|MODEL", help="Work folder with a finished model, or a text GGUF.", show_default=False
        ),
    ],
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- EXTRA...", help="What else the program is given, as it is.", show_default=False),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(
            help="The model's projector, for pictures; default: the folder's.",
            show_default=False,
            rich_help_panel=SERVING,
        ),
    ] = None,
) -> None:
    """Talk to a finished model: start llama-server on it and its projector, and say how to ask it about a picture.

    A model made with --fit is served as it was planned: context, parallel sequences, KV cache. The llama.cpp is the one
    that --llama-cpp names, else MODE_GGUF_LLAMA_CPP, the PATH, our own build (files with one type per expert need it,
    see `mode-gguf runtime build`), else the embedded one. Ctrl-C ends it. Any other --tool takes the place of this
    command.
    """
    from mode_gguf import pipeline
    from mode_gguf.llama_cpp.command_line import command_line

    files = pipeline.find_model_files(model) if model.is_dir() else pipeline.ModelFiles(model, None)
    for note in files.notes:
        say(note)
    if serving.tool == "llama-server":
        _serve(files, mmproj or files.mmproj, extra or (), serving)
        return
    with_pictures = files.mmproj if serving.tool == "llama-mtmd-cli" else None
    line = command_line(files.model, serving.tool, mmproj or with_pictures, extra or (), serving.llama_cpp)
    say(shell_line(line))
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # its exec returns to the shell at once and leaves the program without a console
        raise typer.Exit(subprocess.run(line, check=False).returncode)
    os.execv(line[0], line)


def _serve(files: "ModelFiles", mmproj: Path | None, extra: Sequence[str], options: ServingOptions) -> None:
    from mode_gguf.llama_cpp.llama_server import running_server, server_command, server_settings

    serving = server_settings(files.model, mmproj, files.fit, options, extra)
    line, program = server_command(serving, extra, options.llama_cpp)
    say(f"loading {files.model.name} ({program}) ...")
    try:
        on_line = _echo if options.verbose else lambda line: None
        with _interrupted_by_all(), running_server(line, serving, on_line) as server:
            pictures = f"pictures through {mmproj.name}" if mmproj else "no pictures"
            show(f"{serving.url}  {files.model.name}, {pictures}, {serving.context} tokens of context; Ctrl-C ends it")
            show(f"ask it  {_example(serving.url, with_picture=mmproj is not None)}")
            sys.stdout.flush()
            server.wait()
    except KeyboardInterrupt:
        say("stopped")


@contextmanager
def _interrupted_by_all() -> Iterator[None]:
    """Whatever asks this process to end interrupts it, so that the server is stopped, too."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _echo(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")


def _example(url: str, *, with_picture: bool) -> str:
    """A command that asks the server; the picture's file is read by the shell."""
    post = f"curl -s {shell_word(f'{url}/v1/chat/completions')} -H 'Content-Type: application/json' -d"
    if not with_picture:
        return f"""{post} '{{"messages": [{{"role": "user", "content": "Who are you?"}}]}}'"""
    before = (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
    )
    after = f'"}}}}, {{"type": "text", "text": "{_QUESTION}"}}]}}]}}'
    return f"(printf %s '{before}'; base64 < picture.png | tr -d '\\n'; printf %s '{after}') | {post} @-"
