"""What a type per expert is worth: KL in llama.cpp beside a type per tensor, in as many bytes.

    mode-gguf runtime build
    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    mode-gguf sensitivity CHECKPOINT --out FOLDER
    python experiments/compare_granularity.py CHECKPOINT --out FOLDER --samples HELD_OUT

Files with a type per expert run in mode-gguf's build of llama.cpp, and so does the reference they are compared with;
the others in the one that ships with mode-gguf. KL is in nats per token from the BF16 file, with its standard error.
`--types` may name several lists of candidates; `sensitivity` must have measured them all. `--llama-quantize` adds
llama.cpp's own mixes with the same importance matrix, whose sizes the default `--bpw` are.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiment_command import add_held_out, add_json, add_measured_folder, command_parser, write_json
from external_program import run_program
from llama_cpp_kl import compared, exported, full_precision, mean_and_error, planned, shown
from mode_gguf import pipeline
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.architectures import text_tensors
from mode_gguf.quantization.types import parse_types
from mode_gguf.vocabulary import Granularity, Rounding

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
    """One checkpoint with its measurements, and the held-out folder that files are compared on."""

    run: pipeline.Run
    held_out: Path

    def ours(self, bpw: float, types: str, granularity: Granularity, rounding: Rounding) -> Result:
        """Our file of a size; a type per tensor where one per expert is not cheaper."""
        settings = pipeline.PlanSettings(
            Budget(value=bpw),
            PRESETS["mode"],
            replace(DEFAULT_TYPES, expert=parse_types(types)),
            granularity=granularity,
            rounding=rounding,
        )
        plan = planned(self.run, settings)
        return self._measured(f"per {granularity}: {types}", exported(self.run, plan), rounding, plan)

    def stock(self, mix: str, program: Path, n_weights: int) -> Result:
        """llama.cpp's own mix."""
        folder = self.run.folder
        text = folder.path / f"stock-{mix}.gguf"
        run_program(program, "--imatrix", folder.imatrix_of("fisher"), full_precision(self.run), text, mix)
        measured = self._measured(f"stock {mix}", text, "nearest")
        return replace(measured, bpw=8 * measured.size_bytes / n_weights)

    def _measured(self, contestant: str, text: Path, rounding: Rounding, plan: Plan | None = None) -> Result:
        """Run a file in llama.cpp, and delete it."""
        report = compared(self.run, text, self.held_out, plan)
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
        n_weights = sum(tensor.n_weights for tensor in text_tensors(comparison.run.checkpoint))
        for mix in MIXES:
            yield comparison.stock(mix, arguments.llama_quantize, n_weights)
    for bpw in arguments.bpw:
        for rounding in arguments.rounding:
            for granularity in GRANULARITIES:
                for types in arguments.types:
                    yield comparison.ours(bpw, types, granularity, rounding)


def main() -> None:
    """Measure, print, and write the results."""
    parser = command_parser(__doc__)
    add_measured_folder(parser, "calibrate and sensitivity")
    add_held_out(parser)
    add_json(parser)
    parser.add_argument("--bpw", nargs="*", type=float, default=[2.763, 3.022, 3.550, 3.893, 4.585])
    parser.add_argument("--rounding", nargs="*", choices=("nearest", "feedback"), default=["nearest", "feedback"])
    default = ",".join(quant_type.name for quant_type in DEFAULT_TYPES.expert)
    parser.add_argument("--types", nargs="*", default=[default], help="lists of candidates for the experts")
    parser.add_argument("--llama-quantize", type=Path, help="program of llama.cpp, for its own mixes")
    arguments = parser.parse_args()
    comparison = Comparison(pipeline.open_model(arguments.checkpoint, arguments.out), arguments.samples)
    table = Table("bpw", "contestant", "rounding", "bytes", "predicted", "text KL", "image KL")
    table.title = comparison.run.checkpoint.name
    results: list[Result] = []
    for result in compare(comparison, arguments):
        results.append(result)
        predicted = "" if result.predicted is None else f"{result.predicted:.5f}"
        numbers = (f"{result.size_bytes:,}", predicted, shown(result.text), shown(result.image))
        table.add_row(f"{result.bpw:.3f}", result.contestant, result.rounding, *numbers)
        print(result, flush=True)
        write_json(arguments.json, results)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
