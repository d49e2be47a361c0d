"""How long rounding with feedback takes at a large model's widths: one expert measured, all of them reckoned from it.

    python experiments/bench_rounding.py [--json FILE]

Everything that rounding does for an expert is timed apart: its second moments, their factors, packing to nearest, and
choosing levels again. Inputs and weights are drawn, inputs with a falling spectrum as hidden states have. Seconds are
medians; the model's hours are seconds of an expert times experts and layers, on the threads the benchmark ran on. The
samples' way through the model is not in them: it is `calibrate`'s.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from experiment_command import add_json, command_parser, write_json
from mode_gguf.feedback.second_moments import Moments, feedback_of, with_shared
from mode_gguf.quantization.packer import pack_by_rows
from mode_gguf.quantization.packing import DEFAULT_PACKING
from mode_gguf.quantization.types import QUANT_TYPES


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds for one expert, and the hours of all of them."""

    type: str
    threads: int
    tokens: int
    moments: float
    factors: float
    nearest: float
    feedback: float
    model_hours: float


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time; the first call, which may compile, does not count."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def drawn_inputs(tokens: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs, bfloat16 (tokens, width), whose k-th direction has a variance of 1 / k."""
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scale = torch.arange(1, width + 1).rsqrt()
    inputs: torch.Tensor = (torch.randn(tokens, width, generator=generator) * scale) @ directions
    return inputs.bfloat16()


def measured(type_name: str, arguments: argparse.Namespace) -> Result:
    """One expert: gate and up (expert width x hidden size) and down (hidden size x expert width)."""
    generator = torch.Generator().manual_seed(arguments.seed)
    hidden, width, threads = arguments.hidden, arguments.width, arguments.threads
    weight = torch.rand(arguments.tokens, generator=generator)
    read = {n: drawn_inputs(arguments.tokens, n, generator) for n in (hidden, width)}
    quant_type = QUANT_TYPES[type_name]

    def moments(n: int) -> torch.Tensor:
        sums = Moments(n, torch.device("cpu"))
        sums.add(read[n], weight)
        return sums.sums

    own = {n: moments(n) for n in read}
    feedback = {hidden: feedback_of(with_shared(own[hidden], own[hidden])), width: feedback_of(own[width])}
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    matrices = [torch.randn(*shape, generator=generator).numpy() for shape in shapes]

    def pack(*, fed_back: bool) -> None:
        for matrix in matrices:
            n = matrix.shape[1]
            pack_by_rows(
                matrix,
                quant_type,
                own[n].diagonal().numpy(),
                name="drawn",
                packing=DEFAULT_PACKING,
                threads=threads,
                feedback=feedback[n] if fed_back else None,
            )

    seconds = {
        "moments": median_seconds(lambda: [moments(n) for n in read], arguments.repeats),
        "factors": median_seconds(lambda: [feedback_of(h) for h in own.values()], arguments.repeats),
        "nearest": median_seconds(lambda: pack(fed_back=False), arguments.repeats),
    }
    seconds["feedback"] = median_seconds(lambda: pack(fed_back=True), arguments.repeats) - seconds["nearest"]
    hours = sum(seconds.values()) * arguments.experts * arguments.layers / 3600
    return Result(type_name, threads, arguments.tokens, **seconds, model_hours=hours)


def main() -> None:
    parser = command_parser(__doc__)
    add_json(parser)
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K", "Q4_K"])
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size")
    parser.add_argument("--width", type=int, default=768, help="expert width")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=4096, help="that reach an expert")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [measured(name, arguments) for name in arguments.types]
    columns = "type", "threads", "moments s", "factors s", "nearest s", "feedback s", "hours of the model"
    table = Table(*columns, title=f"an expert {arguments.hidden} x {arguments.width}, {arguments.tokens} tokens")
    for one in results:
        parts = one.moments, one.factors, one.nearest, one.feedback
        table.add_row(one.type, str(one.threads), *(f"{part:.3f}" for part in parts), f"{one.model_hours:.2f}")
    Console().print(table)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
