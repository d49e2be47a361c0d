"""Packing speed, ours against libggml's `ggml_quantize_chunk`: same data, same process, interleaved repeats.

    python -m tools.bench_packing --threads 1 2 --json packing.json

Prints medians in million weights per second. Needs nothing else to be running on the cores it uses.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mode_gguf_kernels import TYPES, pack
from mode_gguf_kernels.simd import LANES
from tests.kernels import ggml_oracle

Packer = Callable[[np.ndarray, str, np.ndarray | None, np.ndarray], object]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median speeds in million weights per second."""

    type_name: str
    importance: bool
    threads: int
    libggml: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.ours / self.libggml


def ours(matrix: np.ndarray, type_name: str, importance: np.ndarray | None, out: np.ndarray) -> object:
    return pack(matrix, type_name, importance, out=out)


def libggml(matrix: np.ndarray, type_name: str, importance: np.ndarray | None, out: np.ndarray) -> object:
    return ggml_oracle.quantize(matrix, type_name, importance, out)


def seconds(
    packer: Packer,
    matrix: np.ndarray,
    type_name: str,
    importance: np.ndarray | None,
    out: np.ndarray,
    executor: ThreadPoolExecutor,
    threads: int,
) -> float:
    """Wall time of packing the matrix with its rows spread evenly over threads."""
    bounds = np.linspace(0, matrix.shape[0], threads + 1).astype(int)
    start = time.perf_counter()
    futures = [
        executor.submit(packer, matrix[first:last], type_name, importance, out[first:last])
        for first, last in itertools.pairwise(bounds)
    ]
    for future in futures:
        future.result()
    return time.perf_counter() - start


def measure(
    matrix: np.ndarray, type_name: str, importance: np.ndarray | None, threads: int, repeats: int
) -> Measurement:
    """Median speeds of both packers; their bytes are compared first."""
    shape = matrix.shape[0], ggml_oracle.row_bytes(type_name, matrix.shape[1])
    outputs = {packer: np.empty(shape, np.uint8) for packer in (libggml, ours)}
    times: dict[Packer, list[float]] = {packer: [] for packer in outputs}
    with ThreadPoolExecutor(threads) as executor:
        for packer, out in outputs.items():  # also compiles, and warms the caches
            seconds(packer, matrix, type_name, importance, out, executor, threads)
        if not np.array_equal(outputs[libggml], outputs[ours]):
            raise SystemExit(f"{type_name}: the two packers disagree, so their speed cannot be compared")
        for _ in range(repeats):
            for packer, out in outputs.items():
                times[packer].append(seconds(packer, matrix, type_name, importance, out, executor, threads))
    speed = {packer: matrix.size / 1e6 / statistics.median(values) for packer, values in times.items()}
    return Measurement(type_name, importance is not None, threads, speed[libggml], speed[ours])


def table(measurements: Sequence[Measurement]) -> Table:
    result = Table(title=f"Packing, million weights per second ({LANES} lanes, medians)")
    for heading in ("type", "importance", "threads", "libggml", "ours", "ratio"):
        result.add_column(heading, justify="left" if heading in ("type", "importance") else "right")
    for m in measurements:
        result.add_row(
            m.type_name,
            "yes" if m.importance else "no",
            str(m.threads),
            f"{m.libggml:.1f}",
            f"{m.ours:.1f}",
            f"{m.ratio:.1f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()

    generator = np.random.default_rng(arguments.seed)
    matrix = generator.normal(scale=0.02, size=(arguments.rows, arguments.columns)).astype(np.float32)
    importance = (generator.standard_normal(arguments.columns) ** 2 + 1e-3).astype(np.float32)
    measurements = [
        measure(matrix, type_name, weights, threads, arguments.repeats)
        for type_name in arguments.types
        for weights in (importance, None)
        for threads in arguments.threads
    ]
    Console().print(table(measurements))
    if arguments.json:
        report = {
            "machine": platform.processor() or platform.machine(),
            "lanes": LANES,
            "shape": matrix.shape,
            "repeats": arguments.repeats,
            "measurements": [{**asdict(m), "ratio": m.ratio} for m in measurements],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
