"""The stages of a conversion at a large model's widths: time, memory and disk, measured and estimated."""

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from depth_lines import GIB, add_depths
from external_program import mode_gguf_command, watched
from mode_gguf import pipeline
from mode_gguf.options import BudgetOptions, CalibrationOptions, ComputeOptions, PlanOptions
from mode_gguf.recipe import Recipe
from wide_checkpoint import write_wide_checkpoint

BPW: Final = 3.5

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
        checkpoint = write_wide_checkpoint(arguments.out / f"Wide-{layers}", layers)
        folder = emptied(arguments.out / f"calibrated-{layers}")
        command = mode_gguf_command("calibrate", checkpoint, "--out", folder, *sample_arguments(arguments))
        run = watched(command, folder / "calibrate.log")
        plain, headless, tokens = float("nan"), float("nan"), ""
        if layers <= arguments.plain_layers:
            log = folder / "plain.log"
            plain_forward: list[str | Path] = [sys.executable, "-c", _PLAIN_FORWARD, checkpoint, arguments.samples]
            watched([*plain_forward, str(arguments.images), str(arguments.texts)], log)
            tokens, *seconds = log.read_text().split()[-3:]
            plain, headless = map(float, seconds)
        runs[layers] = {**asdict(run), "plain": plain, "headless": headless}
        numbers = f"{run.anonymous / GIB:.3f}", f"{run.resident / GIB:.3f}", f"{plain:.1f}", f"{headless:.1f}"
        table.add_row(str(layers), f"{run.seconds:.1f}", *numbers, tokens)
    add_depths(table, runs, ("seconds", "anonymous", "resident"))
    Console().print(table)
    return runs


def bench_stages(arguments: argparse.Namespace) -> object:
    """Time and memory of every stage, and what is said of them before."""
    table = Table(
        "layers", "stage", "seconds", "estimated", "anonymous GiB", "estimated GiB", "written GB", "estimated GB"
    )
    table.title = f"stages, {arguments.images} pictures and {arguments.texts} texts, {arguments.threads} threads"
    runs: dict[str, object] = {}
    for layers in arguments.layers:
        folder = emptied(arguments.out / f"stages-{layers}")
        run = pipeline.open_model(write_wide_checkpoint(arguments.out / f"Wide-{layers}", layers), folder)
        said = {stage.stage: stage for stage in pipeline.estimate_conversion(run, recipe(arguments)).stages}
        for command, given, stages in (
            ("calibrate", sample_arguments(arguments), ("calibrate",)),
            ("sensitivity", ["--device", "cpu"], ("sensitivity",)),
            ("plan", ["--bpw", str(BPW)], ()),
            ("export", ["--threads", str(arguments.threads)], ("round", "export", "projector")),
        ):
            line = mode_gguf_command(command, run.checkpoint.path, "--out", folder, *given)
            measured = watched(line, folder / f"{command}.log")
            runs[f"{command}, {layers} layers"] = measured
            if not stages:
                continue
            needs = [said[stage] for stage in stages]
            disk = sum(need.temporary + need.working + need.written for need in needs)
            table.add_row(
                str(layers),
                command,
                f"{measured.seconds:.1f}",
                f"{sum(need.seconds or 0 for need in needs):.1f}",
                f"{measured.anonymous / GIB:.2f}",
                f"{max(need.memory for need in needs) / GIB:.2f}",
                f"{measured.written / 1e9:.2f}",
                f"{disk / 1e9:.2f}",
            )
            runs[f"{command}, {layers} layers, estimated"] = needs
    Console(width=120).print(table)
    return runs


def recipe(arguments: argparse.Namespace) -> Recipe:
    """What `bench_stages` runs, as `convert` would be asked for it."""
    return Recipe(
        calibration=CalibrationOptions(arguments.samples, image_samples=arguments.images, text_samples=arguments.texts),
        plan=PlanOptions(BudgetOptions(BPW)),
        compute=ComputeOptions("cpu", arguments.threads),
    )


def sample_arguments(arguments: argparse.Namespace) -> list[str]:
    """The samples and the device, as `calibrate` takes them."""
    counts = ["--image-samples", str(arguments.images), "--text-samples", str(arguments.texts)]
    return ["--calibration", arguments.samples, *counts, "--device", "cpu"]


def emptied(folder: Path) -> Path:
    """A folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
