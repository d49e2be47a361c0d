"""Packing kernels beside libggml's `ggml_quantize_chunk`: speed, error of what is packed, start of a new process.

    python experiments/bench_kernels.py --out bench

writes `kernels.md`, `kernels.json` and `kernels.png`. Every mode of `tests.kernels.modes` is measured. Speeds are
medians of interleaved repeats on the same data in the same process, and need nothing else to be running on the cores.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding
import numpy as np

from experiment_command import command_parser
from kernel_report import POWERS, Error, Report, Speed, Start
from mode_gguf.quantization.types import Packer, types_packed_by
from mode_gguf_kernels import TYPES
from mode_gguf_kernels.simd import LANES
from tests.kernels import ggml_oracle, inputs
from tests.kernels.modes import EXACT, MODES, Mode

ROOT = Path(__file__).parent.parent
WEIGHTS = {"Gaussian": "gaussian", "Laplace": "laplace", "Student t": "student-t4"}
"""Distributions whose errors are compared, by the name they are shown under, as in `tests.kernels.inputs`."""

PackFunction = Callable[[np.ndarray, str, np.ndarray | None, np.ndarray], np.ndarray]


def seconds(
    packer: PackFunction,
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


def speeds(
    modes: Sequence[Mode],
    matrix: np.ndarray,
    type_name: str,
    importance: np.ndarray | None,
    threads: int,
    repeats: int,
) -> list[Speed]:
    """Median speeds of libggml and of every mode; the exact mode's bytes are compared with libggml's first.

    Raises:
        SystemExit: the bytes differ, so that the speeds cannot be compared.
    """
    shape = matrix.shape[0], ggml_oracle.row_bytes(type_name, matrix.shape[1])
    packers: dict[str, PackFunction] = {"libggml": ggml_oracle.quantize} | {mode.name: mode.pack for mode in modes}
    outputs = {name: np.empty(shape, np.uint8) for name in packers}
    times: dict[str, list[float]] = {name: [] for name in packers}
    with ThreadPoolExecutor(threads) as executor:
        for repeat in range(1 + repeats):  # the first also compiles, and warms the caches
            for name, packer in packers.items():
                taken = seconds(packer, matrix, type_name, importance, outputs[name], executor, threads)
                if repeat:
                    times[name].append(taken)
            if EXACT.name in packers and not np.array_equal(outputs["libggml"], outputs[EXACT.name]):
                raise SystemExit(f"{type_name}: libggml and the exact mode disagree, so their speed cannot be compared")
    median = {name: matrix.size / 1e6 / statistics.median(values) for name, values in times.items()}
    return [
        Speed(type_name, mode.name, importance is not None, threads, median["libggml"], median[mode.name])
        for mode in modes
    ]


def error_weights(matrix: np.ndarray, importance: np.ndarray, type_name: str, power: float) -> np.ndarray:
    """importance * (sigma^2 + x^2)^power; sigma^2 is of the super-block, as ggml takes it for the type."""
    blocks = matrix.astype(np.float64).reshape(-1, 256)
    variance = np.mean(blocks**2, axis=1, keepdims=True) * (1 if type_name == "Q2_K" else 2)
    weights: np.ndarray = importance * ((variance + blocks**2) ** power).reshape(matrix.shape)
    return weights


def errors(
    modes: Sequence[Mode], matrix: np.ndarray, weights_name: str, type_name: str, importance: np.ndarray
) -> list[Error]:
    """Weighted squared errors of every mode, with the importance and without; relative to the exact mode's with it."""
    weights = [error_weights(matrix, importance, type_name, power) for power in POWERS]

    def measured(mode: Mode, given: np.ndarray | None) -> list[float]:
        unpacked = ggml_oracle.dequantize(mode.pack(matrix, type_name, given), type_name, matrix.shape[1])
        square = (unpacked.astype(np.float64) - matrix) ** 2
        return [float(np.sum(w * square) / np.sum(w * matrix.astype(np.float64) ** 2)) for w in weights]

    exact = measured(EXACT, importance)
    result = []
    for mode, given in itertools.product(modes, (importance, None)):
        found = measured(mode, given)
        ratios = tuple(a / b for a, b in zip(found, exact, strict=True))
        result.append(Error(type_name, mode.name, given is not None, weights_name, tuple(found), ratios))
    return result


FRESH = """
import time
start = time.perf_counter()
import numpy as np
from mode_gguf_kernels import unpack
from tests.kernels.modes import MODES
imported = time.perf_counter()
mode = next(mode for mode in MODES if mode.name == {mode!r})
matrix, importance = np.ones((1, 256), np.float32), np.ones(256, np.float32)
unpack(mode.pack(matrix, {type_name!r}, importance), {type_name!r}, 256)
print(imported - start, time.perf_counter() - imported)
"""


def libggml_speed(matrix: np.ndarray, type_name: str, importance: np.ndarray, repeats: int) -> float:
    """Median million weights per second of a type that only libggml packs, on one thread."""
    ggml_oracle.quantize(matrix, type_name, importance)  # makes the type's tables
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        ggml_oracle.quantize(matrix, type_name, importance)
        taken.append(time.perf_counter() - begin)
    return matrix.size / 1e6 / statistics.median(taken)


def start_of(mode: Mode, type_name: str, repeats: int) -> Start:
    """Median seconds of new processes that import the kernels, pack a row and unpack it, once all is compiled."""
    command = [sys.executable, "-c", FRESH.format(mode=mode.name, type_name=type_name)]
    taken = []
    for _ in range(1 + repeats):  # the first may have to compile
        begin = time.perf_counter()
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        taken.append((time.perf_counter() - begin, *map(float, printed.split())))
    process, imports, first_call = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return Start(type_name, mode.name, process, imports, first_call)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and the plot")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3, help="new processes per type and mode; 0 for none")
    parser.add_argument("--libggml", action="store_true", help="also time the types that only libggml packs")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    generator = np.random.default_rng(arguments.seed)
    shape = arguments.rows, arguments.columns
    matrices = {name: inputs.weights(drawn, generator, *shape) for name, drawn in WEIGHTS.items()}
    importance = inputs.importance("squares", generator, arguments.columns)
    report = Report(llvmlite.binding.get_host_cpu_name(), LANES, shape, arguments.repeats, arguments.seed)
    for type_name in arguments.types:
        modes = [mode for mode in MODES if type_name in mode.types]
        for weights, threads in itertools.product((importance, None), arguments.threads):
            measured = speeds(modes, matrices["Gaussian"], type_name, weights, threads, arguments.repeats)
            report.speeds.extend(measured)
        for name, matrix in matrices.items():
            report.errors.extend(errors(modes, matrix, name, type_name, importance))
        if arguments.starts:
            report.starts.extend(start_of(mode, type_name, arguments.starts) for mode in modes)
    for type_name in types_packed_by(Packer.LIBGGML) if arguments.libggml else ():
        report.others[type_name] = libggml_speed(matrices["Gaussian"], type_name, importance, 3)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report.write(arguments.out)
    print(report.markdown())


if __name__ == "__main__":
    main()
