"""Speed of one type per expert at equal bytes: experts in three types, against all experts in the middle type.

    python experiments/bench_expert_groups.py STOCK PATCHED [--layers N] [--rounds N] [--json FILE]

STOCK and PATCHED are folders with `llama-bench` of the two builds of llama.cpp. The files have a large model's widths,
few layers, a vocabulary of 1024, and drawn weights. The types alternate at random among the experts, in shares that
take as many bytes as the middle type. All files are measured in turn, round after round, so that other work on the
machine meets them alike; shown are medians, and medians of the ratio to the middle type in the same round.

"fair" is what the three types' own speeds in stock would give at these shares, if grouping cost nothing.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from experiment_command import add_json, command_parser, write_json
from external_program import run_program
from mode_gguf.llama_cpp.runtime.random_model import RandomModelShape, random_groups, write_random_model
from mode_gguf.quantization.types import QUANT_TYPES

TYPES: Final = ("Q2_K", "Q3_K", "Q4_K")
SHAPE: Final = RandomModelShape(hidden=2048, width=768, experts=128, used=8, layers=2, heads=32, kv_heads=4)


@dataclass(frozen=True, slots=True)
class Case:
    """A file in a build; `path` is how the patched build computes groups."""

    name: str
    file: Path
    build: Path
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens per second, medians over rounds, and medians of their ratios to the reference case."""

    name: str
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float


def equal_bytes() -> dict[str, int]:
    """Experts per type that take the middle type's bytes, the middle type having as many as the rarer other."""
    low, middle, high = (QUANT_TYPES[name].row_bytes(SHAPE.hidden) for name in TYPES)
    best = min(
        ((n, m) for n in range(1, SHAPE.experts) for m in range(1, SHAPE.experts - n)),
        key=lambda pair: (
            abs(pair[0] * (middle - low) - pair[1] * (high - middle)),
            abs(SHAPE.experts - pair[0] - 2 * pair[1]),
        ),
    )
    return dict(zip(TYPES, (best[0], SHAPE.experts - sum(best), best[1]), strict=True))


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one prompt and of single tokens after it."""
    command = [case.build / "llama-bench", "-m", case.file, "-p", arguments.prompt, "-n", arguments.generate]
    command += ["-r", 1, "-t", arguments.threads, "--repack", int(not arguments.no_repack), "-o", "json"]
    done = run_program(*command, environment={"LLAMA_EXPERT_GROUPS": case.path} if case.path else {})
    return {"prefill" if entry["n_prompt"] else "decode": entry["avg_ts"] for entry in json.loads(done.stdout)}


def summarized(rounds: Sequence[Mapping[str, Mapping[str, float]]], reference: str) -> list[Result]:
    """Medians over rounds; a round has tokens per second by case and kind."""
    results = []
    for name in rounds[0]:
        speed = {kind: statistics.median(one[name][kind] for one in rounds) for kind in ("prefill", "decode")}
        ratio = {
            kind: statistics.median(one[name][kind] / one[reference][kind] for one in rounds)
            for kind in ("prefill", "decode")
        }
        results.append(Result(name, **speed, prefill_ratio=ratio["prefill"], decode_ratio=ratio["decode"]))
    return results


def with_fair(one: dict[str, dict[str, float]], shares: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """A round, and what the shares' mean time per token would give: experts are chosen equally often here."""
    fair = {
        kind: SHAPE.experts / sum(count / one[f"{name}, stock"][kind] for name, count in shares.items())
        for kind in ("prefill", "decode")
    }
    return {**one, "fair": fair}


def main() -> None:
    parser = command_parser(__doc__)
    add_json(parser)
    parser.add_argument("stock", type=Path, help="folder with llama-bench of the stock build")
    parser.add_argument("patched", type=Path, help="folder with llama-bench of the patched build")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-repack", action="store_true", help="weights are not rearranged at load, in both builds")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    shape = replace(SHAPE, layers=arguments.layers)
    shares = equal_bytes()
    groups = random_groups(shape, list(shares.values()), arguments.seed)
    whole = random_groups(shape, [shape.experts])
    middle = TYPES[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        uniform = {name: write_random_model(folder / f"{name}.gguf", shape, [name], whole) for name in TYPES}
        split = write_random_model(folder / "split.gguf", shape, [middle] * 3, groups)
        mixed = write_random_model(folder / "mixed.gguf", shape, TYPES, groups)
        cases = [Case(f"{name}, stock", file, arguments.stock) for name, file in uniform.items()]
        cases.append(Case(f"{middle}, patched", uniform[middle], arguments.patched))
        cases += [Case(f"{middle} in groups, {path}", split, arguments.patched, path) for path in ("skip", "mask")]
        cases += [Case(f"mixed, {path}", mixed, arguments.patched, path) for path in ("skip", "mask")]
        sizes = {file.stem: file.stat().st_size for file in (*uniform.values(), mixed)}
        rounds = [
            with_fair({case.name: measure(case, arguments) for case in cases}, shares) for _ in range(arguments.rounds)
        ]

    results = summarized(rounds, f"{middle}, stock")
    counts = ", ".join(f"{count} {name}" for name, count in shares.items())
    title = f"{arguments.layers} layers, experts {counts}; {arguments.threads} threads, {arguments.rounds} rounds"
    title += ", no repacking" * arguments.no_repack
    table = Table("file, build or path", "prefill tok/s", "decode tok/s", "prefill ratio", "decode ratio", title=title)
    for result in results:
        numbers = result.prefill, result.decode, result.prefill_ratio, result.decode_ratio
        table.add_row(result.name, *(f"{number:.3g}" for number in numbers))
    Console().print(table)
    Console().print(f"bytes: mixed {sizes['mixed']}, {middle} {sizes[middle]}")
    write_json(arguments.json, {"shares": shares, "bytes": sizes, "rounds": rounds, "results": results})


if __name__ == "__main__":
    main()
