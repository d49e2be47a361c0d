"""What a type per expert is worth: KL in llama.cpp beside a type per tensor, in as many bytes.

    mode-gguf runtime build
    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    mode-gguf sensitivity CHECKPOINT --calibration SAMPLES --out FOLDER
    python tools/compare_granularity.py CHECKPOINT --out FOLDER --calibration SAMPLES --samples HELD_OUT

Files with a type per expert run in mode-gguf's build of llama.cpp, and so does the reference they are compared with;
the others in the one that ships with mode-gguf. KL is in nats per token from the BF16 file, with its standard error.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compare_packing import mean_and_error
from mode_gguf import pipeline
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import DEFAULT_TYPES, Granularity
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.quantization.packing import Rounding
from mode_gguf.workfolder import WorkFolder

PROJECTOR = "F16"
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "expert")


@dataclass(frozen=True, slots=True)
class Result:
    """One file: KL means and standard errors of text and image answers, and what the plan predicted for their sum."""

    bpw: float
    granularity: Granularity
    rounding: Rounding
    runtime: str
    size_bytes: int
    predicted: float
    text: tuple[float, float]
    image: tuple[float, float]


def measure(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    calibration: pipeline.CalibrationOptions,
    held_out: Path,
    targets: Sequence[float],
    roundings: Sequence[Rounding],
) -> Iterator[Result]:
    """Every budget with either granularity and rounding."""
    projector = pipeline.projector_path(folder, PROJECTOR)
    if not projector.exists():
        write_projector(projector, checkpoint, PROJECTOR)
    reference = pipeline.run_reference(checkpoint, folder)
    for bpw in targets:
        for rounding in roundings:
            for granularity in GRANULARITIES:
                plan = pipeline.run_plan(
                    checkpoint,
                    folder,
                    Budget(value=bpw),
                    PRESETS["mode"],
                    DEFAULT_TYPES,
                    granularity=granularity,
                    rounding=rounding,
                )
                if rounding == "feedback":
                    pipeline.run_rounding(checkpoint, folder, plan, calibration)
                text = pipeline.export_text(checkpoint, folder, plan)
                report = pipeline.run_validation(
                    text,
                    projector,
                    reference,
                    text.with_suffix(".json"),
                    plan=plan,
                    held_out=held_out,
                    reference_folder=folder.path / f"reference-{held_out.name}-{granularity}",
                )
                assert plan.solver is not None
                yield Result(
                    bpw=plan.bpw,
                    granularity=granularity,
                    rounding=rounding,
                    runtime=report.runtime,
                    size_bytes=text.stat().st_size,
                    predicted=plan.solver.objective,
                    text=mean_and_error(report.text),
                    image=mean_and_error(report.image),
                )
                text.unlink()


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder where calibrate and sensitivity have run")
    parser.add_argument("--calibration", help="as calibrate had it")
    parser.add_argument("--samples", type=Path, required=True, help="held-out folder")
    parser.add_argument("--bpw", nargs="*", type=float, default=[2.763, 3.022, 3.550, 3.893, 4.585])
    parser.add_argument("--rounding", nargs="*", choices=("nearest", "feedback"), default=["nearest", "feedback"])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    checkpoint, folder = pipeline.open_model(arguments.checkpoint, arguments.out)
    calibration = pipeline.CalibrationOptions(arguments.calibration, device="cpu")
    table = Table("bpw", "rounding", "type per", "bytes", "predicted", "text KL", "image KL", title=checkpoint.name)
    results: list[Result] = []
    for result in measure(checkpoint, folder, calibration, arguments.samples, arguments.bpw, arguments.rounding):
        results.append(result)
        kl = [f"{mean:.5f} ± {error:.5f}" for mean, error in (result.text, result.image)]
        size, predicted = f"{result.size_bytes:,}", f"{result.predicted:.5f}"
        table.add_row(f"{result.bpw:.3f}", result.rounding, result.granularity, size, predicted, *kl)
        print(result, flush=True)
        if arguments.json:
            content = json.dumps([asdict(one) for one in results], indent=1)
            arguments.json.write_text(content + "\n", encoding="utf-8")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
