"""mode-gguf inspect: what a GGUF file holds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, show, stdout

LONGEST_VALUE = 100


def command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="GGUF file; of a split model, the first.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Show a GGUF file's types per tensor, bits per weight and metadata; weights are not read."""
    from mode_gguf.validation.structure import describe

    facts = describe(file)
    if json:
        emit_json(facts)
        return
    for key, value in facts["metadata"].items():
        text = str(value)
        show(f"{key} = {text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + '...'}")
    stdout.print(_tensors(facts["tensors"]))
    stdout.print(_types(facts["types"]))
    if facts["bpw"] is not None:
        experts = f", experts {facts['experts_bpw']:.4f}" if facts["experts_bpw"] is not None else ""
        show(f"{facts['size_bytes']:,} bytes, {facts['bpw']:.4f} bpw{experts}")


def _tensors(rows: list[dict[str, Any]]) -> Table:
    table = Table("tensor", "shape", "type", box=None)
    for row in rows:
        table.add_row(row["name"], " x ".join(map(str, row["shape"])), row["type"])
    return table


def _types(types: dict[str, dict[str, int]]) -> Table:
    table = Table("type", "tensors", "weights", "bytes", box=None)
    for name, totals in types.items():
        table.add_row(name, *(f"{totals[column]:,}" for column in ("tensors", "n_weights", "size_bytes")))
    return table
