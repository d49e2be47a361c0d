"""What rounding with feedback does to a model: KL in llama.cpp beside rounding to nearest, in as many bytes.

    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    mode-gguf sensitivity CHECKPOINT --out FOLDER
    python experiments/compare_rounding.py CHECKPOINT --out FOLDER --samples HELD_OUT

Files store every expert in one type (`--types`) or are planned for a budget (`--bpw`), for either rounding. KL is in
nats per token from the BF16 file. With `--every N` only every Nth calibration sample is rounded with, and with
`--on-calibration` the same files are measured on what they were rounded with, too: the difference is overfitting.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiment_command import add_held_out, add_json, add_measured_folder, command_parser, write_json
from llama_cpp_kl import compared, mean_and_error, planned, shown
from mode_gguf import pipeline
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.data.sample import Sample
from mode_gguf.export.imatrix_file import read_imatrix
<<<<<<< HEAD
from mode_gguf.export.text_model import write_text_model
=======
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
>>>>>>> main
from mode_gguf.feedback.round_layers import RoundingSettings, round_tensors
from mode_gguf.feedback.rounded_tensors import RoundedTensors, is_rounded, part_of
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.token_weights import TokenWeights
from mode_gguf.options import ComputeOptions
from mode_gguf.quantization.types import quant_type
from mode_gguf.vocabulary import Rounding

TEXTS_OF_CALIBRATION = 60


@dataclass(frozen=True, slots=True)
class Result:
    """KL means and standard errors of text and image answers; the file's bits per weight."""

    target: str
    rounding: Rounding
    measured_on: str
    bpw: float
    text: tuple[float, float]
    image: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checkpoint with its measurements, and the samples that are rounded with."""

    run: pipeline.Run
    inputs: Sequence[ModelInputs]
    weights: dict[str, np.ndarray]

    @classmethod
    def of(cls, run: pipeline.Run, samples: Sequence[Sample], every: int) -> "Comparison":
        """With every Nth of the samples that `sensitivity` saw."""
        builder = InputBuilder.open(run.checkpoint)
        inputs = [builder.build(sample) for sample in samples]
        measured = TokenWeights.load(run.folder.token_weights)
        measured.check_samples(inputs, run.folder.token_weights)
        used = np.concatenate([np.full(len(one.input_ids), i % every == 0) for i, one in enumerate(inputs)])
        return cls(run, inputs[::every], {name: w[used] for name, w in measured.weights.items()})

    def plan(self, target: str, rounding: Rounding) -> Plan:
        """For a type's name or a number of bits per weight."""
        if not target[0].isdigit():
            return pipeline.make_uniform_plan(self.run, quant_type(target), imatrix="fisher", rounding=rounding)
        budget = Budget(value=float(target))
        return planned(self.run, pipeline.PlanSettings(budget, PRESETS["mode"], DEFAULT_TYPES, rounding=rounding))

    def write(self, path: Path, plan: Plan) -> None:
        """The plan's file, rounded as it says."""
        checkpoint = self.run.checkpoint
        streamed = open_streamed(checkpoint, "cpu")
        importance = read_imatrix(self.run.folder.imatrix_of("fisher"))
        rounded = RoundedTensors(path.with_suffix(".rounded"), "comparison")
        packed = None
        if plan.rounding == "feedback":
            shutil.rmtree(rounded.path, ignore_errors=True)
            settings = RoundingSettings(plan.types, importance, plan.packing, self.weights, threads=2)
            round_tensors(streamed, self.inputs, settings, rounded)
            packed = {
                tensor.name: partial(rounded.matrices, part_of(tensor), tensor.name)
                for tensor in streamed.tensors
                if is_rounded(tensor, plan.types)
            }
<<<<<<< HEAD
        write_text_model(path, checkpoint, plan.types, importance, packing=plan.packing, packed=packed, threads=2)
=======
        write_text_model(
            path, self.checkpoint, TensorPacking(plan.types, importance, packing=plan.packing, packed=packed), threads=2
        )
>>>>>>> main
        shutil.rmtree(rounded.path, ignore_errors=True)

    def measure(self, targets: Sequence[str], held_out: Sequence[Path]) -> Iterator[Result]:
        """Every target with either rounding, on every held-out set."""
        path = self.run.folder.path / "compare-rounding.gguf"
        roundings: tuple[Rounding, ...] = ("nearest", "feedback")
        for target in targets:
            for rounding in roundings:
                plan = self.plan(target, rounding)
                self.write(path, plan)
                for samples in held_out:
                    report = compared(self.run, path, samples, plan)
                    text, image = mean_and_error(report.text), mean_and_error(report.image)
                    yield Result(target, rounding, samples.name, plan.bpw, text, image)
        path.unlink()


def as_held_out(samples: Sequence[Sample], folder: Path) -> Path:
    """Write calibration samples as a held-out set: questions about their pictures, and some of their texts."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    texts = [sample.text for sample in samples if sample.text]
    questions = []
    for number, sample in enumerate(sample for sample in samples if sample.has_image):
        name = f"images/{number:03}.png"
        sample.open_image().save(folder / name)
        question, answer = (next(m.text for m in sample.messages if m.role == role) for role in ("user", "assistant"))
        questions.append({"image": name, "question": question, "answer": answer, "match": "exact", "kind": "any"})
    rows = {"text": [{"text": t} for t in texts[:: max(1, len(texts) // TEXTS_OF_CALIBRATION)]], "questions": questions}
    for name, lines in rows.items():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return folder


def main() -> None:
    """Measure, print, and write the results beside the files."""
    parser = command_parser(__doc__)
    add_measured_folder(parser, "calibrate and sensitivity")
    add_held_out(parser)
    add_json(parser)
    parser.add_argument("--types", nargs="*", default=["Q2_K", "Q3_K", "Q4_K"])
    parser.add_argument("--bpw", nargs="*", default=["2.85", "3.55", "4.6"])
    parser.add_argument("--every", type=int, default=1, help="round with every Nth calibration sample")
    parser.add_argument("--on-calibration", action="store_true", help="measure on calibration samples, too")
    arguments = parser.parse_args()
    run = pipeline.open_model(arguments.checkpoint, arguments.out)
    samples = pipeline.calibration_samples(pipeline.Calibrate.of_folder(run, ComputeOptions()).options)
    held_out = [arguments.samples]
    if arguments.on_calibration:
        held_out.append(as_held_out(samples, run.folder.path / "calibration-as-held-out"))
    table = Table("file", "rounding", "measured on", "bpw", "text KL", "image KL", title=run.checkpoint.name)
    results: list[Result] = []
    comparison = Comparison.of(run, samples, arguments.every)
    for result in comparison.measure([*arguments.types, *arguments.bpw], held_out):
        results.append(result)
        kl = shown(result.text), shown(result.image)
        table.add_row(result.target, result.rounding, result.measured_on, f"{result.bpw:.3f}", *kl)
        print(result, flush=True)
    Console(width=120).print(table)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
