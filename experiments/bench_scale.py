"""What a conversion takes at a large model's widths: time, memory and disk by number of layers, and beside stock tools.

    python experiments/bench_scale.py export --out FOLDER [--layers 2 4 8]
    python experiments/bench_scale.py speed --out FOLDER --llama-cpp SOURCE --llama-quantize PROGRAM
    python experiments/bench_scale.py calibrate --out FOLDER [--layers 2 4 8]
    python experiments/bench_scale.py stages --out FOLDER [--layers 2 4 8]
    python experiments/bench_scale.py disk --out FOLDER --layers 4

`export` and `calibrate` run the commands of those names in processes of their own and watch their memory: "anonymous"
is what the process itself fills, "resident" has the mapped part of the checkpoint with it; peaks of samples taken every
few milliseconds. Lines are fitted through them and drawn out to 48 and 94 layers (Qwen3-VL-30B-A3B, 235B-A22B's depth).
`stages` runs every stage of a conversion and puts what `convert --dry-run` says beside what was measured.
`calibrate` also runs the plain forward of the same samples by transformers, the whole model in memory.
`disk` exports to BF16, so that packing is not the limit, beside reading the checkpoint and writing as many bytes as the
outputs have: nothing is cached when a round begins, and each ends when all is on the disk.
`speed` writes the same types with stock conversion plus llama-quantize, with the same importance matrix and threads.

The checkpoints, of 1.2 GB per layer and 1.2 GB besides, stay in FOLDER.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from compare_with_stock import convert_with_stock
from mode_gguf import pipeline
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.quantization.packing import DEFAULT_PACKING, EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.workfolder import WorkFolder
from wide_checkpoint import write_wide_checkpoint

GIB: Final = 2**30
DEPTHS: Final = (48, 94)
TYPES: Final = ("Q2_K", "Q3_K", "Q4_K")
PACKINGS: Final = {"exact": EXACT, "refined": DEFAULT_PACKING}


@dataclass(frozen=True, slots=True)
class Watched:
    """A process that has ended: seconds, and peaks in bytes."""

    seconds: float
    anonymous: int
    resident: int
    written: int


def watched(command: Sequence[str | Path], log: Path) -> Watched:
    """Run a command and watch what memory it takes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    anonymous = resident = written = 0
    with log.open("w") as output:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output, env=environment)
        status, io = Path(f"/proc/{process.pid}/status"), Path(f"/proc/{process.pid}/io")
        while process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                counted = dict(line.split(":", 1) for line in io.read_text().splitlines())
            except OSError:
                break
            if "RssAnon" in fields:
                now = int(fields["RssAnon"].split()[0]) * 1024
                anonymous, resident = max(anonymous, now), max(resident, int(fields["VmHWM"].split()[0]) * 1024)
                written = max(written, int(counted["write_bytes"]))
            time.sleep(0.005)
        code = process.wait()
        seconds = time.perf_counter() - started
    if code:
        raise SystemExit(f"{command} ends with {code}: {log.read_text()[-2000:]}")
    return Watched(seconds, anonymous, resident, written)


def command_line(*arguments: str | Path) -> list[str | Path]:
    """mode-gguf itself."""
    return [sys.executable, "-m", "mode_gguf_cli", *arguments]


def checkpoint_of(out: Path, layers: int) -> Checkpoint:
    """The checkpoint with so many layers, written if it is not there."""
    return Checkpoint.open(write_wide_checkpoint(out / f"Wide-{layers}", layers))


def with_imatrix(checkpoint: Checkpoint, folder: WorkFolder) -> None:
    """Put a drawn importance matrix into a work folder that has none."""
    if folder.imatrix.exists():
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    entries = {
        tensor.name: (
            generator.gamma(2.0, size=(tensor.n_experts, tensor.row_width)).astype(np.float32),
            np.ones(tensor.n_experts, np.float32),
        )
        for tensor in text_tensors(checkpoint)
        if tensor.role in (Role.EXPERT, Role.DENSE, Role.OUTPUT)
    }
    write_imatrix(folder.imatrix, entries, datasets=("drawn",), chunk_count=1, chunk_size=512)


def planned(checkpoint: Checkpoint, folder: WorkFolder, type_name: str, packing: str) -> Plan:
    """Put a plan with one type for the experts into the work folder."""
    with_imatrix(checkpoint, folder)
    plan = pipeline.make_uniform_plan(
        checkpoint, folder, QUANT_TYPES[type_name], imatrix="plain", packing=PACKINGS[packing]
    )
    return pipeline.save_plan(folder, plan)


def export(out: Path, layers: int, type_name: str, packing: str, threads: int) -> tuple[Watched, int]:
    """Export a checkpoint; also the bytes of what was written."""
    checkpoint = checkpoint_of(out, layers)
    folder = WorkFolder(out / f"work-{layers}", checkpoint.name)
    plan = planned(checkpoint, folder, type_name, packing)
    outputs = pipeline.model_path(folder, plan), pipeline.projector_path(folder, "F16")
    for old in outputs:
        old.unlink(missing_ok=True)
    command = command_line("export", checkpoint.path, "--out", folder.path, "--threads", str(threads))
    result = watched(command, folder.path / "export.log")
    return result, sum(file.stat().st_size for file in outputs)


def fitted(layers: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Slope per layer and value at none, by least squares."""
    slope, start = np.polyfit(layers, values, 1)
    return float(slope), float(start)


def bench_export(arguments: argparse.Namespace) -> object:
    """Memory, time and disk of export by number of layers."""
    type_name, packing = arguments.type, arguments.packing
    table = Table("layers", "seconds", "anonymous GiB", "resident GiB", "outputs GB", "written GB")
    table.title = f"export to {type_name}, {packing} packing, {arguments.threads} threads"
    runs = {}
    for layers in arguments.layers:
        run, outputs = export(arguments.out, layers, type_name, packing, arguments.threads)
        runs[layers] = {**asdict(run), "outputs": outputs}
        numbers = f"{run.anonymous / GIB:.3f}", f"{run.resident / GIB:.3f}", f"{outputs / 1e9:.3f}"
        table.add_row(str(layers), f"{run.seconds:.1f}", *numbers, f"{run.written / 1e9:.3f}")
    add_depths(table, runs, ("seconds", "anonymous", "resident", "outputs", "written"))
    Console().print(table)
    return runs


def add_depths(table: Table, runs: dict[int, dict[str, float]], columns: Sequence[str]) -> None:
    """Rows for deep models, where there are layers enough to fit a line."""
    units = {"seconds": 1.0, "outputs": 1e9, "written": 1e9}
    if len(runs) < 2:
        return
    for depth in DEPTHS:
        values = []
        for column in columns:
            slope, start = fitted(list(runs), [run[column] for run in runs.values()])
            values.append((slope * depth + start) / units.get(column, GIB))
        table.add_row(f"{depth} (line)", f"{values[0]:.0f}", *(f"{value:.3f}" for value in values[1:]))


def bench_speed(arguments: argparse.Namespace) -> object:
    """BF16 safetensors to a finished file, beside stock tools, type by type in turn."""
    (layers,) = arguments.layers[:1]
    checkpoint = checkpoint_of(arguments.out, layers)
    folder = WorkFolder(arguments.out / f"work-{layers}", checkpoint.name)
    n_weights = sum(tensor.n_weights for tensor in text_tensors(checkpoint))
    runs: list[dict[str, object]] = []
    full, quantized = folder.path / "stock-BF16.gguf", folder.path / "stock.gguf"
    for number in range(arguments.rounds):
        for type_name in TYPES:
            seconds: dict[str, float] = {}
            for packing in PACKINGS:
                seconds[packing] = export(arguments.out, layers, type_name, packing, arguments.threads)[0].seconds
            started = time.perf_counter()
            full.unlink(missing_ok=True)
            convert_with_stock(
                arguments.llama_cpp.resolve(), checkpoint.path.resolve(), full, "qwen2", "--outtype", "bf16"
            )
            seconds["conversion"] = time.perf_counter() - started
            quantize = [arguments.llama_quantize, "--pure", "--imatrix", folder.imatrix, "--tensor-type-file"]
            quantize += [folder.tensor_types, full, quantized, type_name, str(arguments.threads)]
            seconds["quantize"] = watched(quantize, folder.path / "quantize.log").seconds
            started = time.perf_counter()
            shutil.copyfile(full, quantized)
            seconds["copy of the BF16 file"] = time.perf_counter() - started
            runs.append({"round": number, "type": type_name, **seconds})
            print(runs[-1], flush=True)
    full.unlink()
    quantized.unlink()
    table = Table("type", "ours, exact, s", "refined, s", "stock: conversion, s", "llama-quantize, s")
    for column in ("stock / exact", "stock / refined", "refined, Mweights/s"):
        table.add_column(column)
    table.title = f"{layers} layers, {n_weights / 1e9:.2f} billion weights, {arguments.threads} threads"
    for type_name in TYPES:
        of_type = [run for run in runs if run["type"] == type_name]
        median = {name: statistics.median(float(str(run[name])) for run in of_type) for name in seconds}
        stock = median["conversion"] + median["quantize"]
        numbers = [median[name] for name in ("exact", "refined", "conversion", "quantize")]
        ratios = [stock / median[name] for name in PACKINGS]
        table.add_row(
            type_name,
            *(f"{n:.1f}" for n in numbers),
            *(f"{n:.1f}" for n in ratios),
            f"{n_weights / 1e6 / median['refined']:.0f}",
        )
    Console(width=140).print(table)
    return runs


_PLAIN_FORWARD = """
import sys, time
import torch
from pathlib import Path
from transformers import AutoModelForImageTextToText
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.data.samples import load_samples
from mode_gguf.checkpoint.folder import Checkpoint

path, source, images, texts = sys.argv[1:]
samples = load_samples(source, max_image_samples=int(images), max_text_samples=int(texts))
builder = InputBuilder.open(Checkpoint.open(Path(path)))
inputs = [builder.build(sample) for sample in samples]
model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
seconds = []
for kept in (0, 1):  # all logits, and those of one position: calibration needs none
    started = time.perf_counter()
    with torch.no_grad():
        for one in inputs:
            model(**one.model_arguments(torch.device("cpu"), torch.float32), logits_to_keep=kept)
    seconds.append(time.perf_counter() - started)
print(sum(len(one.input_ids) for one in inputs), *seconds)
"""


def bench_calibrate(arguments: argparse.Namespace) -> object:
    """Memory and time of calibration by number of layers, and the plain forward of the same samples."""
    table = Table("layers", "seconds", "anonymous GiB", "resident GiB", "forward, s", "without head", "tokens")
    table.title = f"calibration, {arguments.images} pictures and {arguments.texts} texts"
    runs = {}
    for layers in arguments.layers:
        checkpoint = checkpoint_of(arguments.out, layers)
        folder = arguments.out / f"calibrated-{layers}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = command_line("calibrate", checkpoint.path, "--out", folder, "--device", "cpu")
        command += ["--calibration", arguments.samples, "--image-samples", str(arguments.images)]
        command += ["--text-samples", str(arguments.texts)]
        run = watched(command, folder / "calibrate.log")
        plain, headless, tokens = float("nan"), float("nan"), ""
        if layers <= arguments.plain_layers:
            log = folder / "plain.log"
            plain_forward: list[str | Path] = [sys.executable, "-c", _PLAIN_FORWARD, checkpoint.path, arguments.samples]
            watched([*plain_forward, str(arguments.images), str(arguments.texts)], log)
            tokens, *seconds = log.read_text().split()[-3:]
            plain, headless = map(float, seconds)
        runs[layers] = {**asdict(run), "plain": plain, "headless": headless}
        numbers = f"{run.anonymous / GIB:.3f}", f"{run.resident / GIB:.3f}", f"{plain:.1f}", f"{headless:.1f}"
        table.add_row(str(layers), f"{run.seconds:.1f}", *numbers, tokens)
    add_depths(table, runs, ("seconds", "anonymous", "resident"))
    Console().print(table)
    return runs


def forget_cached(folder: Path) -> None:
    """Have the system drop what it caches of the files in a folder."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(folder: Path, target: Path, size: int) -> float:
    """Seconds to read all files of a folder and to write `size` bytes of them."""
    started = time.perf_counter()
    with target.open("wb") as output:
        for file in sorted(folder.iterdir()):
            with file.open("rb") as opened:
                while part := opened.read(1 << 24):
                    output.write(part[: max(0, size - output.tell())])
        output.flush()
        os.fsync(output.fileno())
    target.unlink()
    return time.perf_counter() - started


def bench_disk(arguments: argparse.Namespace) -> object:
    """Export beside what the disk allows."""
    table = Table("layers", "read GB", "written GB", "export, s", "reading and writing, s", "share of the disk's speed")
    table.title = f"export to BF16, {arguments.threads} threads, medians of {arguments.rounds}"
    runs = {}
    for layers in arguments.layers:
        folder = checkpoint_of(arguments.out, layers).path
        seconds: dict[str, list[float]] = {"export": [], "copy": []}
        size = 0
        for _ in range(arguments.rounds):
            forget_cached(folder)
            run, size = export(arguments.out, layers, "BF16", "exact", arguments.threads)
            started = time.perf_counter()
            os.sync()
            seconds["export"].append(run.seconds + time.perf_counter() - started)
            forget_cached(folder)
            seconds["copy"].append(copied(folder, arguments.out / "copied", size))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        read = sum(file.stat().st_size for file in folder.iterdir())
        table.add_row(
            str(layers),
            f"{read / 1e9:.1f}",
            f"{size / 1e9:.1f}",
            f"{medians['export']:.1f}",
            f"{medians['copy']:.1f}",
            f"{100 * medians['copy'] / medians['export']:.0f} %",
        )
        runs[layers] = seconds
    Console().print(table)
    return runs


def bench_stages(arguments: argparse.Namespace) -> object:
    """Time and memory of every stage, and what is said of them before."""
    table = Table(
        "layers", "stage", "seconds", "estimated", "anonymous GiB", "estimated GiB", "written GB", "estimated GB"
    )
    table.title = f"stages, {arguments.images} pictures and {arguments.texts} texts, {arguments.threads} threads"
    samples = ["--calibration", arguments.samples, "--image-samples", str(arguments.images)]
    samples += ["--text-samples", str(arguments.texts), "--device", "cpu"]
    calibration = pipeline.CalibrationOptions(arguments.samples, arguments.images, arguments.texts, device="cpu")
    runs = {}
    for layers in arguments.layers:
        checkpoint = checkpoint_of(arguments.out, layers)
        folder = WorkFolder(arguments.out / f"stages-{layers}", checkpoint.name)
        shutil.rmtree(folder.path, ignore_errors=True)
        folder.path.mkdir(parents=True)
        options = pipeline.ConvertOptions(Budget(value=3.5), calibration, threads=arguments.threads)
        said = pipeline.estimate(checkpoint, folder, options, measured=True)
        needs = {stage.stage: stage for stage in said.stages}
        for stage, given in (
            ("calibrate", samples),
            ("sensitivity", samples),
            ("plan", ["--bpw", "3.5"]),
            ("round", [*samples, "--threads", str(arguments.threads)]),
            ("export", ["--threads", str(arguments.threads)]),
        ):
            run = watched(
                command_line(stage, checkpoint.path, "--out", folder.path, *given), folder.path / f"{stage}.log"
            )
            runs[f"{stage}, {layers} layers"] = asdict(run)
            if stage not in needs:
                continue
            need = needs[stage]
            disk = need.temporary + need.working + need.written
            table.add_row(
                str(layers),
                stage,
                f"{run.seconds:.1f}",
                f"{need.seconds or 0:.1f}",
                f"{run.anonymous / GIB:.2f}",
                f"{need.memory / GIB:.2f}",
                f"{run.written / 1e9:.2f}",
                f"{disk / 1e9:.2f}",
            )
            runs[f"{stage}, {layers} layers, estimated"] = asdict(need)
    Console(width=120).print(table)
    return runs


def main() -> None:
    """Run one of the benchmarks, print it, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=("export", "speed", "calibrate", "stages", "disk"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--type", choices=TYPES, default="Q3_K")
    parser.add_argument("--packing", choices=tuple(PACKINGS), default="refined")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path, help="source tree of llama.cpp")
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--samples", default="demo/calibration")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--plain-layers", type=int, default=2, help="run the plain forward up to so many layers")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    benches = {
        "export": bench_export,
        "speed": bench_speed,
        "calibrate": bench_calibrate,
        "stages": bench_stages,
        "disk": bench_disk,
    }
    runs = benches[arguments.bench](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
