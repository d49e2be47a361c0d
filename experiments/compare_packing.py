"""What ways of packing cost the model: KL in llama.cpp with every expert in one type, by type and variant.

    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    mode-gguf sensitivity CHECKPOINT --out FOLDER
    python experiments/compare_packing.py CHECKPOINT --out FOLDER --samples HELD_OUT

Everything but the experts is stored in Q8_0, so that what differs is their packing. A variant is
`imatrix:packing[:effort[:power[:biased]]]`, such as plain:exact or fisher:refined:max:0.5; see `Packing`. KL is in nats
per token from the BF16 file; the change is against the first variant, the mean of text's and image answers'.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiment_command import add_held_out, add_json, add_measured_folder, command_parser, write_json
from llama_cpp_kl import compared, exported, mean_and_error, shown
from mode_gguf import pipeline
from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.importance.imatrix_kind import chosen_imatrix
from mode_gguf.options import DEFAULT_EXPERT_TYPES, Packing
from mode_gguf.quantization.types import QUANT_TYPES, quant_type
from mode_gguf.vocabulary import ImatrixKind

DEFAULT_VARIANTS = ("plain:exact", "fisher:exact", "plain:refined", "fisher:refined", "fisher:refined:max")


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


def plan_of(run: pipeline.Run, type_name: str, variant: Variant) -> Plan:
    """Experts in one type, everything else in Q8_0, with the variant's importance matrix."""
    plan = pipeline.make_uniform_plan(run, quant_type(type_name), imatrix=variant.imatrix, packing=variant.packing)
    dense = {t.name for t in text_tensors(run.checkpoint) if t.role not in (Role.EXPERT, Role.KEEP)}
    q8_0 = QUANT_TYPES["Q8_0"]
    tensors = [
        tensor.model_copy(update={"type": q8_0.name, "size_bytes": tensor.n_weights * q8_0.type_size // 32})
        if tensor.name in dense
        else tensor
        for tensor in plan.tensors
    ]
    return plan.model_copy(update={"tensors": tensors, "preset": f"experts-{type_name}"})


def measure(run: pipeline.Run, held_out: Path, types: list[str], variants: list[Variant]) -> Iterator[Result]:
    """Export and compare every type in every variant."""
    for type_name in types:
        for variant in variants:
            plan = plan_of(run, type_name, variant)
            report = compared(run, exported(run, plan), held_out, plan)
            text, image = mean_and_error(report.text), mean_and_error(report.image)
            yield Result(type_name, variant.name, *text, *image, report.accuracy["all"].right)


def main() -> None:
    """Measure, print, and write the results beside the files."""
    parser = command_parser(__doc__)
    add_measured_folder(parser, "calibrate and sensitivity")
    add_held_out(parser)
    add_json(parser)
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_EXPERT_TYPES))
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT_VARIANTS), type=Variant.parse)
    arguments = parser.parse_args()
    run = pipeline.open_model(arguments.checkpoint, arguments.out)
    table = Table("experts", "variant", "text KL", "image KL", "change", "right", title=run.checkpoint.name)
    results: list[Result] = []
    base: dict[str, Result] = {}
    for result in measure(run, arguments.samples, arguments.types, arguments.variants):
        first = base.setdefault(result.type_name, result)
        results.append(result)
        table.add_row(
            result.type_name,
            result.variant,
            shown((result.text, result.text_error)),
            shown((result.image, result.image_error)),
            f"{100 * result.change(first):+.1f} %",
            str(result.right),
        )
        print(result, f"{100 * result.change(first):+.1f} %", flush=True)
    Console(width=120).print(table)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
