"""mode-gguf mtp: the file to draft with."""

import os
from enum import StrEnum
from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


class MtpType(StrEnum):
    """`mode_gguf.export.mtp.MTP_TYPES`."""

    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q4_K = "Q4_K"
    BF16 = "BF16"
    F32 = "F32"


def command(
    model: options.Model,
    out: options.Out = None,
    type: Annotated[MtpType, typer.Option(help="Type of the matrices.", case_sensitive=False)] = MtpType.Q8_0,
    pre_tokenizer: options.PreTokenizer = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Write MODEL's block for multi-token prediction to a file of its own.

    llama-server drafts tokens with it, which the model checks all at once:
    [bold]-md mtp-….gguf --spec-type draft-mtp[/bold]. It changes how fast answers come, not what they say.
    """
    from mode_gguf import pipeline
    from mode_gguf.export.mtp import write_mtp
    from mode_gguf.workfolder import mtp_file_name

    checkpoint, folder = pipeline.open_model(model, out, progress())
    path = folder.path / mtp_file_name(folder.name, type.value)
    with pipeline.folder_lock(folder):
        write_mtp(
            path,
            checkpoint,
            type.value,
            pre_tokenizer=pre_tokenizer,
            threads=threads or os.cpu_count() or 1,
            progress=progress(),
        )
    size = path.stat().st_size
    if json:
        emit_json({"mtp": str(path), "size_bytes": size})
        return
    show(f"mtp      {path}  ({size / 1e6:,.1f} MB)")
