"""What a type per expert is worth: KL in llama.cpp beside a type per tensor, in as many bytes.

    mode-gguf runtime build
    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    mode-gguf sensitivity CHECKPOINT --calibration SAMPLES --out FOLDER
    python experiments/compare_granularity.py CHECKPOINT --out FOLDER --calibration SAMPLES --samples HELD_OUT

Files with a type per expert run in mode-gguf's build of llama.cpp, and so does the reference they are compared with;
the others in the one that ships with mode-gguf. KL is in nats per token from the BF16 file, with its standard error.
`--types` may name several lists of candidates; `sensitivity` must have measured them all. `--llama-quantize` adds
llama.cpp's own mixes with the same importance matrix, whose sizes the default `--bpw` are.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compare_packing import mean_and_error
from mode_gguf import pipeline
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import DEFAULT_TYPES, Granularity
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.quantization.types import parse_types
from mode_gguf.validation.reference import RunSettings
from mode_gguf.vocabulary import Rounding
from mode_gguf.workfolder import WorkFolder

PROJECTOR = "F16"
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "expert")
MIXES = ("Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S")


@dataclass(frozen=True, slots=True)
class Result:
    """One file: KL means and standard errors of text and image answers, and what the plan predicted for their sum."""

    contestant: str
    bpw: float
    rounding: Rounding
    runtime: str
    size_bytes: int
    predicted: float | None
    text: tuple[float, float]
    image: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One checkpoint, the folder where it was measured, and what it is calibrated and compared on."""

    checkpoint: Checkpoint
    folder: WorkFolder
    calibration: pipeline.CalibrationOptions
    held_out: Path

    @property
    def projector(self) -> Path:
        """The projector that all files share."""
        path = pipeline.projector_path(self.folder, PROJECTOR)
        if not path.exists():
            write_projector(path, self.checkpoint, PROJECTOR)
        return path

    @property
    def reference(self) -> Path:
        """The full-precision file."""
        return pipeline.run_reference(self.checkpoint, self.folder)

    def planned(self, bpw: float, types: str, granularity: Granularity, rounding: Rounding) -> Result:
        """Our file of a size; a type per tensor where one per expert is not cheaper."""
        plan = pipeline.run_plan(
            self.checkpoint,
            self.folder,
            Budget(value=bpw),
            PRESETS["mode"],
            replace(DEFAULT_TYPES, expert=parse_types(types)),
            granularity=granularity,
            rounding=rounding,
        )
        if rounding == "feedback":
            pipeline.run_rounding(self.checkpoint, self.folder, plan, self.calibration)
        text = pipeline.export_text(self.checkpoint, self.folder, plan)
        assert plan.solver is not None
        return self._measured(f"per {granularity}: {types}", text, rounding, plan)

    def stock(self, mix: str, program: Path, n_weights: int) -> Result:
        """llama.cpp's own mix."""
        text = self.folder.path / f"stock-{mix}.gguf"
        command = [program, "--imatrix", self.folder.imatrix_of("fisher"), self.reference, text, mix]
        run = subprocess.run([str(part) for part in command], capture_output=True, check=False)
        if run.returncode:
            raise SystemExit(f"llama-quantize fails: {run.stderr.decode(errors='replace')[-2000:]}")
        measured = self._measured(f"stock {mix}", text, "nearest")
        return replace(measured, bpw=8 * measured.size_bytes / n_weights)

    def _measured(self, contestant: str, text: Path, rounding: Rounding, plan: Plan | None = None) -> Result:
        """Run a file in llama.cpp, and delete it."""
        engine = "groups" if plan and plan.has_expert_groups else "stock"
        report = pipeline.run_validation(
            text,
            self.projector,
            self.reference,
            text.with_suffix(".json"),
            plan=plan,
            held_out=self.held_out,
            settings=RunSettings(answers="given"),  # those that the tables in docs/ are about
            reference_folder=self.folder.path / f"reference-{self.held_out.name}-{engine}",
        )
        size = text.stat().st_size
        text.unlink()
        return Result(
            contestant=contestant,
            bpw=plan.bpw if plan else 0.0,
            rounding=rounding,
            runtime=report.runtime,
            size_bytes=size,
            predicted=plan.solver.objective if plan and plan.solver else None,
            text=mean_and_error(report.text),
            image=mean_and_error(report.image),
        )


def compare(comparison: Comparison, arguments: argparse.Namespace) -> Iterator[Result]:
    """Stock mixes, then every budget with every rounding, granularity and list of candidates."""
    if arguments.llama_quantize:
        n_weights = sum(tensor.n_weights for tensor in text_tensors(comparison.checkpoint))
        for mix in MIXES:
            yield comparison.stock(mix, arguments.llama_quantize, n_weights)
    for bpw in arguments.bpw:
        for rounding in arguments.rounding:
            for granularity in GRANULARITIES:
                for types in arguments.types:
                    yield comparison.planned(bpw, types, granularity, rounding)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder where calibrate and sensitivity have run")
    parser.add_argument("--calibration", help="as calibrate had it")
    parser.add_argument("--samples", type=Path, required=True, help="held-out folder")
    parser.add_argument("--bpw", nargs="*", type=float, default=[2.763, 3.022, 3.550, 3.893, 4.585])
    parser.add_argument("--rounding", nargs="*", choices=("nearest", "feedback"), default=["nearest", "feedback"])
    default = ",".join(quant_type.name for quant_type in DEFAULT_TYPES.expert)
    parser.add_argument("--types", nargs="*", default=[default], help="lists of candidates for the experts")
    parser.add_argument("--llama-quantize", type=Path, help="program of llama.cpp, for its own mixes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    checkpoint, folder = pipeline.open_model(arguments.checkpoint, arguments.out)
    calibration = pipeline.CalibrationOptions(arguments.calibration, device="cpu")
    comparison = Comparison(checkpoint, folder, calibration, arguments.samples)
    table = Table("bpw", "contestant", "rounding", "bytes", "predicted", "text KL", "image KL", title=checkpoint.name)
    results: list[Result] = []
    for result in compare(comparison, arguments):
        results.append(result)
        kl = [f"{mean:.5f} ± {error:.5f}" for mean, error in (result.text, result.image)]
        predicted = "" if result.predicted is None else f"{result.predicted:.5f}"
        numbers = (f"{result.size_bytes:,}", predicted, *kl)
        table.add_row(f"{result.bpw:.3f}", result.contestant, result.rounding, *numbers)
        print(result, flush=True)
        if arguments.json:
            content = json.dumps([asdict(one) for one in results], indent=1)
            arguments.json.write_text(content + "\n", encoding="utf-8")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
