"""mode-gguf inspect: what a GGUF file holds, alone or beside another file of the same model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mode_gguf.sizes import decimal_size
from mode_gguf_cli import arguments
from mode_gguf_cli.console import cell, emit_json, progress, show, stdout

if TYPE_CHECKING:
    from mode_gguf.quantization.file_comparison import Comparison

LONGEST_VALUE = 100
WIDTH = 140
"""Terminal width for tables in a file or a pipe."""


def command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="GGUF file; of a split model, the first.", show_default=False)
    ],
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="OTHER", help="Another file of the model; FILE is what it is compared with.", show_default=False
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compare; default: all cores.", min=1)] = None,
    json: arguments.Json = False,
) -> None:
    """Show a GGUF file's types per tensor, bits per weight and metadata; weights are not read.

    With OTHER, types, sizes and the error of every tensor of OTHER beside FILE: relative and squared, the sum of
    (OTHER - FILE)^2 over the sum of FILE^2, of weights as llama.cpp unpacks them. Of a split file give the first shard;
    experts in groups are compared expert by expert.
    """
    if other is not None:
        _compare(file, other, threads, as_json=json)
        return
    from mode_gguf.validation.structure import describe

    found = describe(file)
    if json:
        emit_json(found)
        return
    for key, value in found["metadata"].items():
        text = str(value)
        show(f"{key} = {text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + '...'}")
    stdout.print(_tensors(found["tensors"]))
    stdout.print(_types(found["types"]))
    if found["bpw"] is not None:
        experts = f", experts {found['experts_bpw']:.4f}" if found["experts_bpw"] is not None else ""
        show(f"{found['size_bytes']:,} bytes, {found['bpw']:.4f} bpw{experts}")


def _compare(first: Path, second: Path, threads: int | None, *, as_json: bool) -> None:
    from mode_gguf.quantization.file_comparison import compare

    found = compare(first, second, threads=threads, progress=progress())
    if as_json:
        emit_json(found.model_dump(mode="json"))
        return
    console = stdout if stdout.is_terminal else Console(width=WIDTH)
    console.print(_compared_tensors(found))
    console.print(_compared_types(found))
    for name, only in zip("AB", found.only, strict=True):
        if only:
            show(f"only in {name}  {', '.join(only)}")
    for name, file in zip("AB", found.files, strict=True):
        show(f"{name}          {file.name}  ({file.bpw:.3f} bpw, {decimal_size(file.size_bytes)})")
    total = found.total
    show(f"error      {_error(total.error)} over all {total.n_weights:,} weights of {total.tensors} tensors")


def _tensors(rows: list[dict[str, Any]]) -> Table:
    table = Table("tensor", "shape", "type", box=None)
    for row in rows:
        table.add_row(cell(row["name"]), " x ".join(map(str, row["shape"])), cell(row["type"]))
    return table


def _types(types: dict[str, dict[str, int]]) -> Table:
    table = Table("type", "tensors", "weights", "bytes", box=None)
    for name, totals in types.items():
        table.add_row(cell(name), *(f"{totals[column]:,}" for column in ("tensors", "n_weights", "size_bytes")))
    return table


def _compared_tensors(found: "Comparison") -> Table:
    table = Table("tensor", "A", "B", box=None)
    for title in ("A, bytes", "B, bytes", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found.tensors:
        sizes = [f"{size:,}" for size in one.size_bytes]
        note = one.note or _error(one.error)
        table.add_row(cell(one.name), *map(cell, map(_mixed, one.types)), *sizes, cell(note))
    return table


def _compared_types(found: "Comparison") -> Table:
    table = Table("A", "B", box=None)
    for title in ("tensors", "weights", "A, bytes", "B, bytes", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found.by_types:
        counts = [f"{number:,}" for number in (one.tensors, one.n_weights, *one.size_bytes)]
        table.add_row(*map(cell, one.types), *counts, _error(one.error))
    return table


def _mixed(types: dict[str, int]) -> str:
    if len(types) == 1:
        return next(iter(types))
    return ", ".join(f"{name} {number}" for name, number in types.items())


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
