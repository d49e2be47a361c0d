"""The demo: convert the shipped checkpoint at 3.0 bits per weight and measure it beside uniform types in llama.cpp.

    python tools/demo.py --out demo-output

Everything below is measured in this run, on the held-out set in demo/heldout; nothing is stored beforehand. KL is the
divergence from the BF16 file in nats per token over the full vocabulary: of the texts' tokens, and of the tokens of
BF16's answers about pictures. Stock files store every expert in one type and everything else in
Q4_K, as llama-quantize packs them with the plain importance matrix.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from rich import box
from rich.console import Console
from rich.table import Table

from mode_gguf import pipeline
from mode_gguf.options import BudgetOptions, CalibrationOptions, PlanOptions, ValidationOptions
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.recipe import Recipe
from mode_gguf.validation.report import Divergence, ValidationReport
from mode_gguf.validation.validate import ComparedModels
from mode_gguf_cli.console import log_to_stderr, progress, say, show, stdout

DEMO = Path(__file__).parent.parent / "demo"
BITS = 3.0
BASELINES = ("Q2_K", "Q3_K")
MODE = f"MODE {BITS:.1f} bpw"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    report: ValidationReport


def main() -> None:
    """Convert, measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for everything written")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "Demo-VL-MoE", help="another checkpoint to run it on")
    arguments = parser.parse_args()
    log_to_stderr()
    started = time.monotonic()

    recipe = Recipe(
        calibration=CalibrationOptions(str(DEMO / "calibration")),
        plan=PlanOptions(BudgetOptions(BITS)),
        validation=ValidationOptions(samples=DEMO / "heldout"),
    )
    run = pipeline.open_model(arguments.checkpoint, arguments.out, recipe, progress())
    say(f"converting {run.checkpoint.path} to {BITS} bits per weight")
    result = pipeline.convert(run, recipe)
    rows = [Row(MODE, ValidationReport.load(run.folder.report))]
    for name in BASELINES:
        say(f"for comparison: every expert in {name}, as llama-quantize packs it")
        rows.insert(-1, Row(f"stock {name}", uniform(run, name, recipe.validation)))

    print_table(rows)
    draw(rows, arguments.out / "comparison.png")
    show_example(rows[-1].report)
    show(f"\nmodel       {result.model}\nprojector   {result.mmproj}")
    show(f"report      {result.page}\ncomparison  {arguments.out / 'comparison.png'}")
    show(f"{time.monotonic() - started:.0f} seconds in all")


def uniform(run: pipeline.Run, name: str, options: ValidationOptions) -> ValidationReport:
    """Export and measure the file that stores every expert in one type, packed as stock tools do."""
    plan = pipeline.make_uniform_plan(run, QUANT_TYPES[name], imatrix="plain", packing=EXACT)
    export, projector, reference = pipeline.ExportText(plan), pipeline.ExportProjector(), pipeline.ExportReference()
    run.ensure(projector, reference)
    export.write(run)
    (text,), (mmproj,), (full_precision,) = (stage.outputs(run) for stage in (export, projector, reference))
    return pipeline.validate_file(
        ComparedModels(text, full_precision, mmproj, plan.stored_types),
        run.folder.path / f"report-{name}.json",
        options,
        reference_folder=run.folder.reference,
        progress=run.progress,
    )


def print_table(rows: Sequence[Row]) -> None:
    """Print the table, a column per file; the first is the reference itself."""
    reference, before = rows[0].report.reference, rows[0].report.reference_accuracy["all"]
    assert reference is not None
    columns: list[tuple[str, ...]] = [
        (
            "BF16",
            *(f"{reference.size_bytes / 1e6:.1f} MB", f"{reference.bpw:.3f}", f"{reference.experts_bpw:.3f}"),
            *("", "", "", ""),
            f"{before.right}/{before.asked} = {100 * before.share:.1f} %",
            "",
        )
    ]
    for row in rows:
        report, accuracy = row.report, row.report.accuracy["all"]
        text, image = divergences(report)
        columns.append(
            (
                row.name,
                f"{report.candidate.size_bytes / 1e6:.1f} MB",
                f"{report.candidate.bpw:.3f}",
                f"{report.candidate.experts_bpw:.3f}",
                *(f"{part.kl_mean:.4f} ± {part.kl_mean_error:.4f}" for part in (text, image)),
                *(f"{100 * (part.top1_agreement or 0):.1f} %" for part in (text, image)),
                f"{accuracy.right}/{accuracy.asked} = {100 * accuracy.share:.1f} %",
                "{} / {}".format(*changed_answers(report)),
            )
        )
    table = Table("", *(column[0] for column in columns), box=box.SIMPLE_HEAD)
    labels = (
        "size",
        "bpw",
        "experts' bpw",
        "text KL",
        "image KL",
        "text top-1",
        "image top-1",
        "accuracy",
        "lost / won",
    )
    for number, label in enumerate(labels, start=1):
        table.add_row(label, *(column[number] for column in columns))
    # Where nobody watches, lines need not fit a window.
    Console(width=None if stdout.is_terminal else 120).print(table)
    text, image = divergences(rows[0].report)
    show(
        f"KL: nats per token from BF16 ± standard error; {text.positions} tokens of text, {image.positions} of answers"
    )
    show(f"accuracy: exact answers to {before.asked} questions about pictures; lost / won: against BF16's answers")
    show(f"measured in {rows[0].report.runtime}")


def divergences(report: ValidationReport) -> tuple[Divergence, Divergence]:
    """Of text and of image answers; the demo's held-out set has both."""
    assert report.text is not None
    assert report.image is not None
    return report.text, report.image


def changed_answers(report: ValidationReport) -> tuple[int, int]:
    """Questions the reference answers right and the file does not, and the other way round."""
    before = [answer.reference_answer == answer.expected for answer in report.answers]
    after = [bool(answer.right) for answer in report.answers]
    pairs = list(zip(before, after, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot KL over size, text and image apart."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, kind in zip(axes, ("text", "image"), strict=True):
        for row in rows:
            part = getattr(row.report, kind)
            colour = "tab:red" if row.name == MODE else "tab:blue"
            axis.errorbar(row.report.candidate.bpw, part.kl_mean, part.kl_mean_error, fmt="o", color=colour, capsize=3)
            top = (row.report.candidate.bpw, part.kl_mean + part.kl_mean_error)
            axis.annotate(row.name, top, xytext=(0, 6), textcoords="offset points", ha="center")
        axis.set(title=f"{kind} answers" if kind == "image" else "text", xlabel="bits per weight of the text model")
        axis.set_ylabel("KL divergence from BF16, nats per token")
        axis.margins(x=0.3, y=0.15)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_example(report: ValidationReport) -> None:
    """Show one question about a picture, preferably one that needs knowledge, and what the MODE file answers."""
    answer = next((a for a in report.answers if a.right and a.kind in {"sign", "emblem"}), report.example)
    if answer is None:
        return
    show(f"\npicture     {DEMO / 'heldout' / 'images' / answer.image}")
    show(f"question    {answer.question}")
    show(f"BF16        {answer.reference_answer}")
    show(f"{MODE:<11} {answer.answer}")


if __name__ == "__main__":
    main()
