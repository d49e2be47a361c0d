"""How long the allocation's integer programme takes, and how good its solutions are proven to be.

    python experiments/bench_allocation.py [--json FILE]

Costs are drawn: log-normal per unit, falling with the bits and mostly convex, with some noise. `global` is one budget
for all units, used to within 0.5 %; `per layer` gives each layer that budget's share; `equal` makes each layer meet its
share as exactly as its sizes allow. Seconds are medians of whole calls, building the model included.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from experiment_command import add_json, command_parser, write_json
from mode_gguf.allocation.planner import UNDERSHOOT
from mode_gguf.allocation.reachable import greatest_size
from mode_gguf.allocation.solver import SizeRange, Solution, solve, solve_layers
from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.options import DEFAULT_DENSE_TYPES
from mode_gguf.quantization.types import QuantType, quant_type

PROJECTIONS = ("gate", "up", "down")
PROJECTION_WEIGHTS = 1536 * 4096


@dataclass(frozen=True, slots=True)
class Result:
    """Median seconds of one programme, and the largest proven gap."""

    layers: int
    units: int
    budget: str
    bpw: float
    used_bpw: float
    seconds: float
    gap: float
    solver: str


def drawn_units(layers: int, experts: int, types: list[QuantType], seed: int) -> list[AllocationUnit]:
    """A unit per projection of every expert of every layer."""
    generator = np.random.default_rng(seed)
    n = layers * experts * len(PROJECTIONS)
    bits = np.array([quant_type.bits_per_weight for quant_type in types])
    scale, noise = generator.lognormal(-9, 1.2, (n, 1)), generator.lognormal(0, 0.15, (n, len(types)))
    costs = np.sort(scale * np.exp(-1.3 * bits) * noise, axis=1)[:, ::-1]
    sizes = [PROJECTION_WEIGHTS // t.block_size * t.type_size for t in types]
    units = []
    for index in range(n):
        layer, rest = divmod(index, experts * len(PROJECTIONS))
        expert, projection = divmod(rest, len(PROJECTIONS))
        name = f"blk.{layer}.expert.{expert}.{PROJECTIONS[projection]}"
        candidates = tuple(map(Candidate, types, sizes, costs[index].tolist()))
        units.append(AllocationUnit(name, (name,), PROJECTION_WEIGHTS, candidates, layer, expert))
    return units


def programmes(units: list[AllocationUnit], bpw: float, gap: float) -> Iterator[tuple[str, Callable[[], Solution]]]:
    """The three kinds of budget, each with a call that solves it."""
    by_layer: dict[int | None, list[AllocationUnit]] = {}
    for unit in units:
        by_layer.setdefault(unit.layer, []).append(unit)

    def share(members: list[AllocationUnit]) -> SizeRange:
        budget = int(bpw * sum(unit.n_weights for unit in members) / 8)
        return SizeRange(int(budget * (1 - UNDERSHOOT)) + 1, budget)

    def exactly(members: list[AllocationUnit]) -> SizeRange:
        most = greatest_size(members, share(members).budget)
        return SizeRange(most, most) if most is not None else share(members)

    def each(limits: Callable[[list[AllocationUnit]], SizeRange]) -> Solution:
        return solve_layers(units, {layer: limits(members) for layer, members in by_layer.items()}, gap=gap)

    floor, budget = share(units)
    yield "global", lambda: solve(units, budget, floor=floor, gap=gap)
    yield "per layer", lambda: each(share)
    yield "equal", lambda: each(exactly)


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = command_parser(__doc__)
    add_json(parser)
    parser.add_argument("--layers", nargs="+", type=int, default=[16, 94], help="layers of the models; default: 16 94")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_DENSE_TYPES))
    parser.add_argument("--bpw", nargs="+", type=float, default=[2.7, 3.1, 4.1, 5.3])
    parser.add_argument("--gap", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    types = [quant_type(name) for name in arguments.types]
    table = Table("layers", "units", "budget", "bpw", "used", "seconds", "gap", "solver")
    results = []
    for layers in arguments.layers:
        units = drawn_units(layers, arguments.experts, types, arguments.seed)
        weights = sum(unit.n_weights for unit in units)
        for bpw in arguments.bpw:
            for name, call in programmes(units, bpw, arguments.gap):
                taken = []
                for _ in range(arguments.repeats):
                    begin = time.perf_counter()
                    solution = call()
                    taken.append(time.perf_counter() - begin)
                used, seconds = 8 * solution.size_bytes / weights, statistics.median(taken)
                result = Result(layers, len(units), name, bpw, used, seconds, solution.gap, solution.solver)
                results.append(result)
                row = (f"{bpw:g}", f"{used:.4f}", f"{seconds:.2f}", f"{solution.gap:.1e}", solution.solver)
                table.add_row(str(layers), f"{len(units):,}", name, *row)
    Console(width=120).print(table)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
