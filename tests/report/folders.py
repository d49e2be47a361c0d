"""Work folders as the stages leave them, made from drawn numbers, so that a page takes no conversion."""

from pathlib import Path

import numpy as np
from PIL import Image

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.costs import ExpertUse, MeasuredCosts
from mode_gguf.allocation.plan import Plan, Provenance
from mode_gguf.allocation.planner import Problem, expert_plan, optimal_plan
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.forward.modality import KeyTokens
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.pipeline.report_data import unread
from mode_gguf.pipeline.stage_cache import StageCache, StageState
from mode_gguf.validation.report import Accuracy, Answer, Divergence, FileRecord, ValidationReport
from mode_gguf.workfolder import WorkFolder

HIDDEN, WIDTH, VOCABULARY = 256, 512, 1024
NAME, FINGERPRINT = "Drawn-VL-MoE", "f" * 16


def tensors(layers: int, experts: int) -> list[SourceTensor]:
    """A text model's, in the order of its file."""
    found = [SourceTensor("token_embd.weight", (VOCABULARY, HIDDEN), Role.EMBEDDING, (), unread)]
    for layer in range(layers):
        for part, rows in (("q", HIDDEN), ("k", 128), ("v", 128), ("output", HIDDEN)):
            name = f"blk.{layer}.attn_{part}.weight"
            found.append(SourceTensor(name, (rows, HIDDEN), Role.DENSE, (), unread, name, layer))
        name = f"blk.{layer}.ffn_gate_inp.weight"
        found.append(SourceTensor(name, (experts, HIDDEN), Role.KEEP, (), unread, None, layer))
        for part, rows, width in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            found.append(SourceTensor(name, (experts, rows, width), Role.EXPERT, (), unread, name, layer, part))
    found.append(SourceTensor("output.weight", (VOCABULARY, HIDDEN), Role.OUTPUT, (), unread, "output.weight"))
    return found


def write_folder(
    path: Path, *, layers: int = 2, experts: int = 8, bpw: float = 3.4, per_expert: bool = False, name: str = NAME
) -> WorkFolder:
    """Calibration, sensitivity, plan, report and ledger of a conversion that never was."""
    path.mkdir(parents=True, exist_ok=True)
    folder, random, model = WorkFolder(path, name), np.random.default_rng(0), tensors(layers, experts)
    statistics = _statistics(name, layers, experts, random)
    statistics.save(folder.calibration)
    table = _table(name, model, statistics, random)
    table.save(folder.sensitivity)
    use = {layer: ExpertUse(statistics.counts(layer), statistics.routing_weights(layer)) for layer in range(layers)}
    measured = MeasuredCosts(table.arrays, tuple(table.expert_types), tuple(table.dense_types), use)
    budget, made_from = Budget(value=bpw), Provenance(tool_version="0", model=name, model_fingerprint=FINGERPRINT)
    problem = Problem.of(model, measured, budget=budget, types=DEFAULT_TYPES, preset=PRESETS["mode"])
    plan = (expert_plan if per_expert else optimal_plan)(problem, made_from, budget)
    plan.save(folder.plan)
    ledger = StageCache(folder)
    for stage, output in (
        ("calibrate", folder.calibration),
        ("sensitivity", folder.sensitivity),
        ("plan", folder.plan),
    ):
        ledger.record(StageState(stage, {}, (output,)), 61.5)
    report(plan).save(folder.report)
    settings = {"held-out data": str(_held_out(path / "held-out"))}
    ledger.record(StageState("validate", settings, (folder.report,)), 20.0)
    return folder


def report(plan: Plan, bpw: float | None = None) -> ValidationReport:
    """A report on a file with the plan's bits per weight, or others."""
    divergence = Divergence(
        positions=1000,
        kl_mean=0.0321,
        kl_mean_error=0.0012,
        kl_p99=0.4,
        kl_p99_9=1.1,
        top1_agreement=0.952,
        perplexity=7.9,
        reference_perplexity=7.7,
    )
    accuracy = Accuracy(right=3, asked=4, share=0.75, low=0.3, high=0.95)
    answers = [
        Answer(
            image=f"{number}.png",
            kind=("sign", "chart")[number % 2],
            question=f"What is in picture {number}?",
            expected="a square",
            answer="a square" if number else "a circle",
            right=number > 0,
            reference_answer="a square",
        )
        for number in range(4)
    ]
    file = FileRecord(name="drawn.gguf", size_bytes=plan.size_bytes + 4096, bpw=bpw or plan.bpw, experts_bpw=2.9)
    return ValidationReport(
        tool_version="0",
        runtime="llama.cpp b1",
        held_out="held-out",
        candidate=file,
        mmproj=None,
        reference=file,
        text=divergence,
        image=divergence.model_copy(update={"kl_mean": 0.0123}),
        accuracy={"all": accuracy, "sign": accuracy},
        reference_accuracy={"all": accuracy},
        answers=answers,
        smoke=None,
        seconds={"candidate": 12.5},
        warnings=("layer 1: no text token reached expert 3 of 8; the layer's mean stands in",),
    )


def _statistics(name: str, layers: int, experts: int, random: np.random.Generator) -> CalibrationStatistics:
    arrays: dict[str, np.ndarray] = {}
    for layer in range(layers):
        share = random.lognormal(0, 1.2, (3, experts))
        counts = np.round(share / share.sum(axis=1, keepdims=True) * [[4000], [2000], [9000]]).astype(np.int64)
        counts[0, layer % experts] = 0
        arrays[f"blk.{layer}.ffn_exps.input.count"] = counts
        arrays[f"blk.{layer}.ffn_exps.input.sum2"] = counts[:, :, None] * np.ones(HIDDEN)
        arrays[f"blk.{layer}.ffn_exps.weight"] = counts / 2
    samples = SampleCounts(text_samples=10, image_samples=12, text_tokens=4000, vision_tokens=11000)
    return CalibrationStatistics(name, FINGERPRINT, arrays, samples, KeyTokens(), ("drawn",))


def _table(
    name: str, model: list[SourceTensor], statistics: CalibrationStatistics, random: np.random.Generator
) -> SensitivityTable:
    """Costs that fall by three quarters a bit, larger for busy experts."""
    expert, dense = (tuple(t.name for t in types) for types in (DEFAULT_TYPES.expert, DEFAULT_TYPES.dense))
    arrays: dict[str, np.ndarray] = {}
    for tensor in model:
        if tensor.role is Role.KEEP:
            continue
        types = DEFAULT_TYPES.expert if tensor.role is Role.EXPERT else DEFAULT_TYPES.dense
        fall = np.array([4.0**-one.bits_per_weight for one in types])
        if tensor.role is Role.EXPERT and tensor.layer is not None:
            busy = statistics.counts(tensor.layer) / statistics.counts(tensor.layer).sum()
            each = busy * random.lognormal(0, 0.5, (2, *busy.shape))
            arrays[f"{tensor.name}.expert"] = each[..., None] * fall
            arrays[f"{tensor.name}.unit"] = arrays[f"{tensor.name}.expert"].sum(axis=2)
            together = f"blk.{tensor.layer}.ffn_exps.expert"
            arrays[together] = arrays.get(together, 0) + arrays[f"{tensor.name}.expert"]
        else:
            arrays[f"{tensor.name}.unit"] = 0.02 * random.lognormal(0, 1, (2, 3, 1)) * fall
    return SensitivityTable(name, FINGERPRINT, "fisher", expert, dense, arrays, (500, 300), 3, 0, {})


def _held_out(folder: Path) -> Path:
    """Pictures and questions to the report's answers."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(4):
        Image.new("RGB", (96, 64), (60 * number, 90, 160)).save(folder / "images" / f"{number}.png")
        rows.append(f'{{"image": "images/{number}.png", "question": "What is in picture {number}?"}}')
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return folder
