"""mode-gguf export: plan to files."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    model: options.Model,
    out: options.Out = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan to follow; default: plan.json in the work folder.", show_default=False)
    ] = None,
    imatrix: Annotated[
        options.ImatrixName | None,
        typer.Option(
            help="Importance matrix to pack with; default: the one the plan was made with.", show_default=False
        ),
    ] = None,
    rounding: Annotated[
        options.RoundingName | None,
        typer.Option(help="How weights are rounded; default: as planned.", show_default=False),
    ] = None,
    mmproj_type: options.ProjectorOption = options.ProjectorType.F16,
    pre_tokenizer: options.PreTokenizer = None,
    shard_size: options.ShardSize = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Pack MODEL's weights as the plan says; writes the text GGUF and the projector.

    Uses an importance matrix in the work folder; without a plain one it packs plainly. What is rounded with feedback is
    taken from `mode-gguf round`.
    """
    from mode_gguf import pipeline
    from mode_gguf.allocation.plan import Plan

    shard_bytes = options.shard_bytes_of(shard_size)
    checkpoint, folder = pipeline.open_model(model, out, progress())
    loaded = Plan.load(plan or folder.plan)
    with pipeline.folder_lock(folder):
        text, mmproj = pipeline.run_export(
            checkpoint,
            folder,
            loaded,
            imatrix=imatrix.value if imatrix else None,
            rounding=rounding.value if rounding else None,
            projector_type=mmproj_type.value,
            pre_tokenizer=pre_tokenizer,
            shard_bytes=shard_bytes,
            threads=threads,
            progress=progress(),
        )
    size = sum(file.stat().st_size for file in pipeline.model_files(checkpoint, folder, loaded, shard_bytes))
    if json:
        emit_json({"model": str(text), "mmproj": str(mmproj), "bpw": loaded.bpw, "size_bytes": size})
        return
    show(f"model    {text}  ({loaded.bpw:.3f} bpw, {size / 1e6:,.1f} MB)")
    show(f"mmproj   {mmproj}")
