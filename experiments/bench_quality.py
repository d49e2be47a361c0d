"""Our plan against stock mixes and every other way of allocating, at equal file size, measured in llama.cpp.

    python experiments/bench_quality.py CHECKPOINT --calibration SAMPLES --samples HELD_OUT --llama-cpp FOLDER --out W

FOLDER of `--llama-cpp` holds llama-quantize and llama-imatrix. The sizes are those of the stock mixes; at each, every
contestant makes a real GGUF file of that size (`--size`), and llama.cpp measures it on the held-out set. Calibration
runs once per seed, on three quarters of the samples, drawn anew. Stock files are made twice: with our importance
matrix and with llama-imatrix's own of the calibration texts. All contestants but stock are packed alike, with the
default packing and the Fisher importance matrix, so that only the choice of types differs.

Every measurement is kept in OUT/results.json and not repeated, so a run can be stopped and go on.
`--report DOCS` writes the table and the plot of all that is there.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from experiment_command import add_held_out, command_parser
from external_program import run_program
from llama_cpp_kl import compared, exported, full_precision, planned
from mode_gguf import pipeline
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.costs import CostModel
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.presets import PRESETS, Preset
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.samples import load_samples
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.export.text_model import metadata_bytes
from mode_gguf.options import CalibrationOptions, ComputeOptions, SensitivityOptions
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.vocabulary import Method
from mode_gguf.workfolder import WorkFolder
from mode_gguf_cli.console import log_to_stderr, say
from quality_report import Result, Results, write_report

MIXES = ("Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S")
UNIFORM_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K")
OURS, UNIFORM, STOCK, STOCK_TEXT = "mode", "uniform", "stock, our imatrix", "stock, text imatrix"
SHARE_OF_SAMPLES = 0.75
FILLED_FIRST = ("output.weight", "attn_v", "attn_output", "attn_k", "attn_q", "token_embd")

PAPER_COSTS = PRESETS["paper"].costs
_GLOBAL = Preset("", "expert-mse", PAPER_COSTS, dense="fixed")
"""The paper's costs with one budget for the model; the variants below change one signal of it."""

CONTESTANTS = {
    OURS: PRESETS["mode"],
    "paper": PRESETS["paper"],
    "paper, global budget": _GLOBAL,
    "blind frequency": replace(_GLOBAL, costs=CostModel("product", pooled=True)),
    "text + all vision": replace(_GLOBAL, costs=CostModel("product")),
    "text + redundant": replace(_GLOBAL, costs=CostModel("product", modality_weights=(1.0, 0.0, 1.0))),
    "random": replace(_GLOBAL, costs=CostModel("random")),
    "sensitivity only": replace(_GLOBAL, costs=replace(PAPER_COSTS, combination="sensitivity")),
    "frequency only": replace(_GLOBAL, costs=replace(PAPER_COSTS, combination="frequency")),
    "pmq": replace(PRESETS["pmq"], scope="model", equality=False),
}
ABLATIONS = {
    "types of the rest fixed": replace(PRESETS["mode"], dense="fixed"),
    "budget per layer": replace(PRESETS["mode"], dense="fixed", scope="layer", equality=True),
    "block-mse for Fisher": Preset("", "block-mse"),
    "expert-mse for Fisher": Preset("", "expert-mse", CostModel("product")),
    "Fisher times frequency": Preset("", "fisher", CostModel("product")),
    "text and key vision tokens": Preset("", "fisher", CostModel(modality_weights=(1.0, 1.0, 0.0))),
    "text tokens": Preset("", "fisher", CostModel(modality_weights=(1.0, 0.0, 0.0))),
    "text answers": Preset("", "fisher", CostModel(answer_weights=(1.0, 0.0))),
    "measured units": replace(PRESETS["mode"], unit_kl=True),
    "image answers": Preset("", "fisher", CostModel(answer_weights=(0.0, 1.0))),
}
"""Our plan with one signal taken out or exchanged."""

REFINED, ROUNDS = "refined", 2
"""Our plan, improved by measuring it and its neighbours."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One checkpoint, what it is calibrated and measured on, and where everything goes."""

    checkpoint: Checkpoint
    calibration: Path
    held_out: Path
    tools: Path
    out: Path

    @property
    def shared(self) -> pipeline.Run:
        """What does not depend on the seed: full-precision file, projector, reference answers."""
        return pipeline.Run(self.checkpoint, WorkFolder(self.out / "shared", self.checkpoint.name))

    def seeded(self, seed: int, method: Method) -> pipeline.Run:
        """What one seed's calibration gave, measured by one method."""
        return pipeline.Run(self.checkpoint, WorkFolder(self.out / f"seed-{seed}" / method, self.checkpoint.name))

    def result(self, mix: str, contestant: str, seed: int, key: str, file: Path) -> Result:
        """What llama.cpp says about a file."""
        return Result.of(mix, contestant, seed, key, file, compared(self.shared, file, self.held_out))


def calibrated(bench: Bench, seed: int, method: Method) -> pipeline.Run:
    """The run of a seed and method, after what is missing in its folder has been measured."""
    run, first = bench.seeded(seed, method), bench.seeded(seed, "fisher")
    if not first.folder.calibration.exists():
        say(f"seed {seed}: calibrating")
        first.ensure(pipeline.Calibrate(sample_options(bench, seed)))
    if not run.folder.calibration.exists():
        run.folder.path.mkdir(parents=True)
        for path in (first.folder.calibration, first.folder.imatrix):
            shutil.copy(path, run.folder.path)
    if not run.folder.sensitivity.exists():
        say(f"seed {seed}: measuring {method}")
        calibrate = pipeline.Calibrate.of_folder(run, ComputeOptions())
        run.ensure(pipeline.MeasureSensitivity.of(calibrate, SensitivityOptions(method), DEFAULT_TYPES))
    return run


def sample_options(bench: Bench, seed: int) -> CalibrationOptions:
    """Three quarters of the images and of the texts."""
    samples = load_samples(str(bench.calibration), max_image_samples=10**6, max_text_samples=10**6, seed=seed)
    images = sum(sample.image is not None for sample in samples)
    return CalibrationOptions(
        source=str(bench.calibration),
        image_samples=round(SHARE_OF_SAMPLES * images),
        text_samples=round(SHARE_OF_SAMPLES * (len(samples) - images)),
        seed=seed,
    )


def text_imatrix(bench: Bench) -> Path:
    """What llama-imatrix makes of the calibration texts."""
    path = bench.out / "imatrix-text.gguf"
    if not path.exists():
        corpus = bench.out / "texts.txt"
        samples = load_samples(str(bench.calibration), max_image_samples=0, max_text_samples=10**6)
        corpus.write_text("\n\n".join(sample.text for sample in samples if sample.text), encoding="utf-8")
        say("llama-imatrix on the calibration texts")
        model = full_precision(bench.shared)
        run_program(bench.tools / "llama-imatrix", "-m", model, "-f", corpus, "-o", path, "-c", 512, "-ngl", 0)
    return path


def stock_file(bench: Bench, mix: str, imatrix: Path) -> Path:
    """The mix as llama-quantize makes it with an importance matrix."""
    path = bench.out / f"stock-{mix}.gguf"
    run_program(bench.tools / "llama-quantize", "--imatrix", imatrix, full_precision(bench.shared), path, mix)
    return path


def plan_of(bench: Bench, contestant: str, seed: int, size: int) -> Plan:
    """A contestant's plan for a file of `size` bytes; uniform is the largest that fits."""
    if contestant == UNIFORM:
        run = calibrated(bench, seed, "fisher")
        plans = [pipeline.make_uniform_plan(run, QUANT_TYPES[name]) for name in UNIFORM_TYPES]
        return max(
            (plan for plan in plans if plan.size_bytes <= size), key=lambda plan: plan.size_bytes, default=plans[0]
        )
    preset = (CONTESTANTS | ABLATIONS | {REFINED: PRESETS[OURS]})[contestant]
    preset = replace(preset, costs=replace(preset.costs, seed=seed))
    run = calibrated(bench, seed, preset.method)
    sensitivity = pipeline.MeasureSensitivity.of_folder(run, ComputeOptions())
    if preset.unit_kl and not run.folder.unit_kl.exists():
        say(f"seed {seed}: measuring units")
        run.ensure(pipeline.MeasureUnitKl(sensitivity))
    budget, rounds = Budget(kind="size", value=size), ROUNDS if contestant == REFINED else 0
    plan = planned(run, pipeline.PlanSettings(budget, preset, DEFAULT_TYPES, refine=rounds), sensitivity)
    return plan if preset.dense == "measured" else filled(plan, size - metadata_bytes(bench.checkpoint))


def filled(plan: Plan, size: int) -> Plan:
    """The plan with what is left of `size` bytes spent on the tensors it did not choose for, one type up at a time.

    A type of a whole tensor of experts is a large step in a small model; without this, files would differ in size. The
    order is llama.cpp's: output, values and attention output first.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for kind in FILLED_FIRST:
        for tensor in (one for one in plan.tensors if kind in one.name):
            for quant_type in DEFAULT_TYPES.dense:
                larger = tensor.n_weights * quant_type.type_size // quant_type.block_size
                spent = sum(one.size_bytes for one in tensors.values()) - tensors[tensor.name].size_bytes
                if tensors[tensor.name].size_bytes < larger <= size - spent:
                    changes = {"type": quant_type.name, "size_bytes": larger}
                    tensors[tensor.name] = tensor.model_copy(update=changes)
    return plan.model_copy(update={"tensors": list(tensors.values())})


def measure_missing(bench: Bench, arguments: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet."""
    results = Results(bench.out / "results.json")
    for seed in arguments.seeds:
        for mix in arguments.mixes:
            for name, imatrix in (
                (STOCK, calibrated(bench, seed, "fisher").folder.imatrix_of("fisher")),
                (STOCK_TEXT, text_imatrix(bench)),
            ):
                if not results.has(mix, name, seed):
                    file = stock_file(bench, mix, imatrix)
                    results.add(bench.result(mix, name, seed, file.name, file))
        for name in arguments.contestants:
            for mix in arguments.mixes:
                if results.has(mix, name, seed):
                    continue
                try:
                    plan = plan_of(bench, name, seed, results.size(mix))
                except InfeasibleBudgetError as error:
                    say(f"{name} at the size of {mix}: {error}")
                    continue
                key = key_of(plan, seed)
                if (same := results.equal_file(key)) is not None:
                    results.add(replace(same, mix=mix, contestant=name))
                    continue
                file = exported(calibrated(bench, seed, "fisher"), plan, imatrix="fisher")
                results.add(bench.result(mix, name, seed, key, file))
                file.unlink()


def key_of(plan: Plan, seed: int) -> str:
    """Files of one seed with equal types are equal."""
    return sha256(json.dumps([seed, [(t.name, t.type) for t in plan.tensors]]).encode()).hexdigest()[:16]


def main() -> None:
    """Measure, and write the report if asked to."""
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="calibration samples")
    add_held_out(parser)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    names = [*CONTESTANTS, UNIFORM, *ABLATIONS, REFINED]
    parser.add_argument("--contestants", nargs="+", choices=names, default=[*CONTESTANTS, UNIFORM])
    parser.add_argument("--report", type=Path, help="folder for the table and the plot of all results")
    arguments = parser.parse_args()
    log_to_stderr()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    bench = Bench(checkpoint, arguments.calibration, arguments.samples, arguments.llama_cpp, arguments.out)
    measure_missing(bench, arguments)
    if arguments.report:
        write_report(
            Results(bench.out / "results.json").all(), checkpoint.name, arguments.report, OURS, (STOCK, STOCK_TEXT)
        )


if __name__ == "__main__":
    main()
