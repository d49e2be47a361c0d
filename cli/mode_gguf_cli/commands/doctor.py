"""mode-gguf doctor: what is installed here and what will be used."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show

PACKAGES = (
    "gguf",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "numba",
    "pulp",
    "highspy",
    "xllamacpp",
    "datasets",
)


def command(
    llama_cpp: arguments.LlamaCpp = None,
    bench_runtime: Annotated[
        bool,
        typer.Option(
            "--bench-runtime", help="Measure what a type per expert costs in speed here, in the build of `runtime`."
        ),
    ] = False,
    json: arguments.Json = False,
) -> None:
    """Show versions, the compute device, and which llama.cpp would be used to validate."""
    from mode_gguf import __version__
    from mode_gguf.pipeline import environment, runtime_speed

    environment_rows: dict[str, object] = {"mode-gguf": __version__, "python": platform.python_version()}
    environment_rows |= {name: _installed(name) for name in PACKAGES}
    environment_rows |= environment(llama_cpp)
    if bench_runtime:
        environment_rows |= runtime_speed(progress())
    if json:
        emit_json(environment_rows)
        return
    for name, value in environment_rows.items():
        show(f"{name:<18} {value}")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
