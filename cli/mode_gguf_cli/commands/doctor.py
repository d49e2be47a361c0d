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

    facts: dict[str, object] = {"mode-gguf": __version__, "python": platform.python_version()}
    facts |= {name: _installed(name) for name in PACKAGES}
    facts |= environment(llama_cpp)
    if bench_runtime:
        facts |= runtime_speed(progress())
    if json:
        emit_json(facts)
        return
    for name, value in facts.items():
        show(f"{name:<18} {value}")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
