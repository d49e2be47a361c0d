"""mode-gguf compare: two files of one model beside each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show, stdout

if TYPE_CHECKING:
    from mode_gguf.quantization.file_comparison import Comparison

WIDTH = 140
"""Of tables, where nobody watches."""


def command(
    first: Annotated[
        Path, typer.Argument(metavar="A.gguf", help="What is compared with, such as BF16.", show_default=False)
    ],
    second: Annotated[Path, typer.Argument(metavar="B.gguf", help="What is compared.", show_default=False)],
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Show types, sizes and the error of every tensor of B.gguf beside A.gguf, two files of one model.

    The error is relative and squared: the sum of (B - A)^2 over the sum of A^2, of weights as llama.cpp unpacks them.
    Of a split file give the first shard; experts in groups are compared expert by expert.
    """
    from mode_gguf.quantization.file_comparison import compare

    found = compare(first, second, threads=threads, progress=progress())
    if json:
        emit_json(found.model_dump(mode="json"))
        return
    console = stdout if stdout.is_terminal else Console(width=WIDTH)
    console.print(_tensors(found))
    console.print(_types(found))
    for name, only in zip("AB", found.only, strict=True):
        if only:
            show(f"only in {name}  {', '.join(only)}")
    for name, file in zip("AB", found.files, strict=True):
        show(f"{name}          {file.name}  ({file.bpw:.3f} bpw, {file.size_bytes / 1e6:,.1f} MB)")
    total = found.total
    show(f"error      {_error(total.error)} over all {total.n_weights:,} weights of {total.tensors} tensors")


def _tensors(found: "Comparison") -> Table:
    table = Table("tensor", "A", "B", box=None)
    for title in ("A, bytes", "B, bytes", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found.tensors:
        sizes = [f"{size:,}" for size in one.size_bytes]
        table.add_row(one.name, *map(_mixed, one.types), *sizes, one.note or _error(one.error))
    return table


def _types(found: "Comparison") -> Table:
    table = Table("A", "B", box=None)
    for title in ("tensors", "weights", "A, bytes", "B, bytes", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found.by_types:
        counts = [f"{number:,}" for number in (one.tensors, one.n_weights, *one.size_bytes)]
        table.add_row(*one.types, *counts, _error(one.error))
    return table


def _mixed(types: dict[str, int]) -> str:
    if len(types) == 1:
        return next(iter(types))
    return ", ".join(f"{name} {number}" for name, number in types.items())


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
