"""Export at a large model's widths: memory by number of layers, speed beside stock tools and beside the disk's."""

import argparse
import os
import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from compare_with_stock import convert_with_stock
from depth_lines import GIB, add_depths
from external_program import WatchedProcess, mode_gguf_command, watched
from mode_gguf import pipeline
from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.options import Packing
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.vocabulary import PACKING_MODES, PackingMode
from wide_checkpoint import write_wide_checkpoint

TYPES: Final = ("Q2_K", "Q3_K", "Q4_K")


def opened(out: Path, layers: int) -> pipeline.Run:
    """The checkpoint with so many layers, and the work folder of its exports."""
    return pipeline.open_model(write_wide_checkpoint(out / f"Wide-{layers}", layers), out / f"work-{layers}")


def with_imatrix(run: pipeline.Run) -> None:
    """Put a drawn importance matrix into a work folder that has none."""
    path = run.folder.imatrix
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    entries = {
        tensor.name: (
            generator.gamma(2.0, size=(tensor.n_experts, tensor.row_width)).astype(np.float32),
            np.ones(tensor.n_experts, np.float32),
        )
        for tensor in text_tensors(run.checkpoint)
        if tensor.role in (Role.EXPERT, Role.DENSE, Role.OUTPUT)
    }
    write_imatrix(path, entries, datasets=("drawn",), chunk_count=1, chunk_size=512)


def planned(run: pipeline.Run, type_name: str, packing: PackingMode) -> Plan:
    """Put a plan with one type for the experts into the work folder."""
    with_imatrix(run)
    plan = pipeline.make_uniform_plan(run, QUANT_TYPES[type_name], imatrix="plain", packing=Packing(packing))
    pipeline.save_plan(run.folder, plan)
    return plan


def export(out: Path, layers: int, type_name: str, packing: PackingMode, threads: int) -> tuple[WatchedProcess, int]:
    """Export a checkpoint; also the bytes of what was written."""
    run = opened(out, layers)
    plan = planned(run, type_name, packing)
    outputs = *pipeline.ExportText(plan).outputs(run), *pipeline.ExportProjector().outputs(run)
    for old in outputs:
        old.unlink(missing_ok=True)
    options = "--out", run.folder.path, "--threads", str(threads)
    result = watched(mode_gguf_command("export", run.checkpoint.path, *options), run.folder.path / "export.log")
    return result, sum(file.stat().st_size for file in outputs)


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


def bench_speed(arguments: argparse.Namespace) -> object:
    """BF16 safetensors to a finished file, beside stock tools, type by type in turn."""
    (layers,) = arguments.layers[:1]
    run = opened(arguments.out, layers)
    checkpoint, folder = run.checkpoint, run.folder
    n_weights = sum(tensor.n_weights for tensor in text_tensors(checkpoint))
    runs: list[dict[str, object]] = []
    full, quantized = folder.path / "stock-BF16.gguf", folder.path / "stock.gguf"
    for number in range(arguments.rounds):
        for type_name in TYPES:
            seconds: dict[str, float] = {}
            for packing in PACKING_MODES:
                seconds[packing] = export(arguments.out, layers, type_name, packing, arguments.threads)[0].seconds
            started = time.perf_counter()
            full.unlink(missing_ok=True)
            convert_with_stock(arguments.llama_cpp.resolve(), checkpoint.path.resolve(), full, "qwen2", outtype="bf16")
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
        ratios = [stock / median[name] for name in PACKING_MODES]
        table.add_row(
            type_name,
            *(f"{n:.1f}" for n in numbers),
            *(f"{n:.1f}" for n in ratios),
            f"{n_weights / 1e6 / median['refined']:.0f}",
        )
    Console(width=140).print(table)
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
        folder = opened(arguments.out, layers).checkpoint.path
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
