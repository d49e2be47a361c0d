"""What ways of packing cost the model: KL in llama.cpp with every expert in one type, by type and variant.

    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    mode-gguf sensitivity CHECKPOINT --calibration SAMPLES --out FOLDER
    python experiments/compare_packing.py CHECKPOINT --out FOLDER --samples HELD_OUT

Everything but the experts is stored in Q8_0, so that what differs is their packing. A variant is
`imatrix:packing[:effort[:power[:biased]]]`, such as plain:exact or fisher:refined:max:0.5; see `Packing`. KL is in nats
per token from the BF16 file; the change is against the first variant, the mean of text's and image answers'.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mode_gguf import pipeline
from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.importance.imatrix_kind import ImatrixKind, chosen_imatrix
from mode_gguf.options import Packing
from mode_gguf.quantization.types import QUANT_TYPES, quant_type
from mode_gguf.validation.reference import RunSettings
from mode_gguf.validation.report import Divergence
from mode_gguf.workfolder import WorkFolder

DEFAULT_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
DEFAULT_VARIANTS = ("plain:exact", "fisher:exact", "plain:refined", "fisher:refined", "fisher:refined:max")
PROJECTOR = "F16"


@dataclass(frozen=True, slots=True)
class Variant:
    """An importance matrix of the work folder, and a way of packing."""

    name: str
    imatrix: ImatrixKind
    packing: Packing

    @classmethod
    def parse(cls, name: str) -> "Variant":
        imatrix, mode, *rest = name.split(":")
        effort, power, bias = (*rest, *("default", "0", "unbiased")[len(rest) :])
        packing = Packing(mode, effort, float(power), bias == "unbiased")  # type: ignore[arg-type]  # it checks them
        return cls(name, chosen_imatrix(imatrix, "fisher"), packing)


@dataclass(frozen=True, slots=True)
class Result:
    """KL means and their standard errors, and right answers."""

    type_name: str
    variant: str
    text: float
    text_error: float
    image: float
    image_error: float
    right: int

    def change(self, base: "Result") -> float:
        """Mean of the relative changes of text and image KL."""
        return (self.text / base.text + self.image / base.image) / 2 - 1


def plan_of(checkpoint: Checkpoint, folder: WorkFolder, type_name: str, variant: Variant) -> Plan:
    """Experts in one type, everything else in Q8_0, with the variant's importance matrix."""
    plan = pipeline.make_uniform_plan(
        checkpoint,
        folder,
        quant_type(type_name),
        imatrix=variant.imatrix,
        packing=variant.packing,
    )
    dense = {t.name for t in text_tensors(checkpoint) if t.role not in (Role.EXPERT, Role.KEEP)}
    q8_0 = QUANT_TYPES["Q8_0"]
    tensors = [
        tensor.model_copy(update={"type": q8_0.name, "size_bytes": tensor.n_weights * q8_0.type_size // 32})
        if tensor.name in dense
        else tensor
        for tensor in plan.tensors
    ]
    return plan.model_copy(update={"tensors": tensors, "preset": f"experts-{type_name}"})


def measure(
    checkpoint: Checkpoint, folder: WorkFolder, held_out: Path, types: list[str], variants: list[Variant]
) -> Iterator[Result]:
    """Export and validate every type in every variant."""
    projector = pipeline.projector_path(folder, PROJECTOR)
    if not projector.exists():
        write_projector(projector, checkpoint, PROJECTOR)
    reference = pipeline.run_reference(checkpoint, folder)
    for type_name in types:
        for variant in variants:
            plan = plan_of(checkpoint, folder, type_name, variant)
            report = pipeline.run_validation(
                pipeline.export_text(checkpoint, folder, plan),
                projector,
                reference,
                folder.path / "compare-packing.json",
                plan=plan,
                held_out=held_out,
                settings=RunSettings(answers="given"),  # those that the tables in docs/ are about
                reference_folder=folder.path / "reference",
            )
            text, image = mean_and_error(report.text), mean_and_error(report.image)
            yield Result(type_name, variant.name, *text, *image, report.accuracy["all"].right)


def mean_and_error(divergence: Divergence | None) -> tuple[float, float]:
    """KL's mean and its standard error."""
    if divergence is None or divergence.kl_mean is None or divergence.kl_mean_error is None:
        raise SystemExit("the held-out set needs texts and questions about pictures")
    return divergence.kl_mean, divergence.kl_mean_error


def main() -> None:
    """Measure, print, and write the results beside the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder where calibrate and sensitivity have run")
    parser.add_argument("--samples", type=Path, required=True, help="held-out folder")
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_TYPES))
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT_VARIANTS), type=Variant.parse)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    checkpoint, folder = pipeline.open_model(arguments.checkpoint, arguments.out)
    table = Table("experts", "variant", "text KL", "image KL", "change", "right", title=checkpoint.name)
    results: list[Result] = []
    base: dict[str, Result] = {}
    for result in measure(checkpoint, folder, arguments.samples, arguments.types, arguments.variants):
        first = base.setdefault(result.type_name, result)
        results.append(result)
        table.add_row(
            result.type_name,
            result.variant,
            f"{result.text:.5f} ± {result.text_error:.5f}",
            f"{result.image:.5f} ± {result.image_error:.5f}",
            f"{100 * result.change(first):+.1f} %",
            str(result.right),
        )
        print(result, f"{100 * result.change(first):+.1f} %", flush=True)
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
