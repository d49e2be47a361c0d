"""mode-gguf round: the plan's tensors, rounded with error feedback."""

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
    calibration: options.Calibration = None,
    device: options.DeviceOption = options.Device.AUTO,
    imatrix: Annotated[
        options.ImatrixName | None,
        typer.Option(
            help="Importance matrix to pack with; default: the one the plan was made with.", show_default=False
        ),
    ] = None,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Pack MODEL's K-quants so that the errors of a row's weights make up for each other.

    Runs the samples of `calibrate` and `sensitivity` through MODEL once more, layer by layer; cut off, it goes on where
    it was. The packed layers wait in the work folder for `export --rounding feedback`, as large as the file will be.
    """
    from mode_gguf import pipeline
    from mode_gguf.allocation.plan import Plan

    checkpoint, folder = pipeline.open_model(model, out, progress())
    chosen = options.calibration_options(calibration, image_samples, text_samples, device, seed, memory)
    with pipeline.folder_lock(folder):
        report = pipeline.run_rounding(
            checkpoint,
            folder,
            Plan.load(plan or folder.plan),
            chosen,
            imatrix=imatrix.value if imatrix else None,
            threads=threads,
            progress=progress(),
        )
    matrices, nearest = sum(report.matrices.values()), sum(report.nearest.values())
    if json:
        emit_json({"rounded": str(folder.rounded), "matrices": matrices, "rounded_to_nearest": nearest})
        return
    show(f"rounded  {folder.rounded}  ({matrices - nearest:,} of {matrices:,} matrices with feedback)")
