"""How many label draws and samples Fisher sensitivity needs: plans from parts of a measurement against those from all.

    mode-gguf calibrate CHECKPOINT --calibration SAMPLES --out FOLDER
    python experiments/check_fisher_stability.py CHECKPOINT --out FOLDER --bpw 2.9 3.0 3.2 3.5

Fisher costs are sums over samples, averaged over draws. So the samples are dealt into parts, each is measured in
batches of draws with their own seeds, and parts and batches are put together again in every size asked for: one
measurement of everything answers for all, with replicates. Pieces are kept in FOLDER/fisher-pieces and not measured
twice. Candidates are packed with the plain importance matrix of all samples, so that nothing but costs differs.

    costs off   sum over units and types of the costs' absolute difference from the biggest run's, over their sum
    bytes       share of the biggest run's plan whose type differs
    regret      cost of the plan at the biggest run's costs, relative to the best plan for them, less one
    unseen      the same at the costs of what the plan was not made from: parts left out, or else draws left out

Bytes and regrets are means over replicates and budgets, of plans with one type per tensor and per expert; `worst` is
the largest regret. The biggest run contains the smaller ones, so that `regret` flatters large parts; `unseen` does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from rich.console import Console
from rich.table import Table

from experiment_command import add_json, add_measured_folder, command_parser, write_json
from mode_gguf import pipeline
from mode_gguf.allocation.costs import CostModel, MeasuredCosts, expert_units, tensor_units
from mode_gguf.allocation.solver import solve
from mode_gguf.allocation.units import DEFAULT_TYPES, AllocationUnit
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.importance.sensitivity import measure_sensitivity
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.pipeline.stages.calibrate import stored_statistics
from mode_gguf.quantization.packing import DEFAULT_PACKING

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
DRAWS = (1, 2, 3, 6)
GRANULARITIES = {"tensor": tensor_units, "expert": expert_units}

Piece = tuple[int, int]
"""A part of the samples, and a batch of draws."""

Types = Mapping[str, str]
"""The type chosen for every unit."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One granularity: how plans from a part of the measurement do against those from all of it."""

    costs_off: float
    bytes_moved: float
    regret: float
    worst: float
    unseen: float | None


@dataclass(frozen=True, slots=True)
class Result:
    """Plans from a share of the samples and some draws; means over replicates and budgets."""

    share: float
    draws: int
    replicates: int
    tensor: Agreement
    expert: Agreement


def measured_pieces(run: pipeline.Run, parts: int, batches: Sequence[int]) -> dict[Piece, SensitivityTable]:
    """Every part of the samples in every batch of draws, measured now or before."""
    statistics = stored_statistics(run)
    samples, importance = pipeline.calibration_samples(statistics.options), read_imatrix(run.folder.imatrix)
    pieces = {}
    for part in range(parts):
        for batch, draws in enumerate(batches):
            path = run.folder.path / "fisher-pieces" / f"{part}-of-{parts}-draws-{draws}-seed-{batch}.safetensors"
            if not path.exists():
                table = measure_sensitivity(
                    run.checkpoint,
                    samples[part::parts],
                    importance,
                    statistics,
                    SensitivityRequest(
                        expert_types=DEFAULT_TYPES.expert,
                        dense_types=DEFAULT_TYPES.dense,
                        packing=DEFAULT_PACKING,
                        label_draws=draws,
                        seed=batch,
                    ),
                ).table
                table.save(path)
                print(path, flush=True)
            pieces[part, batch] = SensitivityTable.load(path)
    return pieces


def combined(tables: Sequence[SensitivityTable]) -> dict[str, np.ndarray]:
    """Costs of all tables' samples and draws together: weighed by scored positions and draws, per kind of answer."""
    weights = np.array([[table.draws * n for n in table.positions] for table in tables], np.float64)
    shares = weights / np.maximum(weights.sum(axis=0), 1)
    return {
        name: np.asarray(
            sum(
                share.reshape(-1, *[1] * (array.ndim - 1)) * table.arrays[name]
                for share, table in zip(shares, tables, strict=True)
            )
        )
        for name, array in tables[0].arrays.items()
        if name.endswith((".unit", ".expert"))
    }


def subsets(parts: int, batches: Sequence[int], share: float, draws: int) -> Iterator[tuple[list[int], list[int]]]:
    """Disjoint groups of parts that make up `share`, each with disjoint groups of batches that make up `draws`."""
    size = max(1, round(share * parts))
    part_groups = [list(range(start, start + size)) for start in range(0, parts - size + 1, size)]
    free, batch_groups = list(range(len(batches))), []
    while group := next(
        (
            list(found)
            for count in range(1, len(free) + 1)
            for found in combinations(free, count)
            if sum(batches[batch] for batch in found) == draws
        ),
        None,
    ):
        batch_groups.append(group)
        free = [batch for batch in free if batch not in group]
    for part_group in part_groups:
        for batch_group in batch_groups:
            yield part_group, batch_group


@dataclass(frozen=True, slots=True)
class Planner:
    """Solves for the budgets, from whichever costs."""

    tensors: Sequence[SourceTensor]
    template: SensitivityTable
    granularity: str
    bpws: Sequence[float]

    def units(self, arrays: Mapping[str, np.ndarray]) -> list[AllocationUnit]:
        """The units at these costs."""
        template = self.template
        # How often experts are used is inside Fisher costs already: no frequencies are asked for.
        measured = MeasuredCosts(arrays, tuple(template.expert_types), tuple(template.dense_types), {})
        return GRANULARITIES[self.granularity](self.tensors, DEFAULT_TYPES, measured, CostModel())

    def plans(self, units: Sequence[AllocationUnit]) -> list[Types]:
        """The best types at every budget."""
        n_weights = sum(tensor.n_weights for tensor in self.tensors)
        kept = sum(4 * tensor.n_weights for tensor in self.tensors if tensor.role is Role.KEEP)
        return [
            {
                unit.name: choice.quant_type.name
                for unit, choice in zip(units, solve(units, int(bpw * n_weights / 8) - kept).choices, strict=True)
            }
            for bpw in self.bpws
        ]


def cost_of(types: Types, units: Sequence[AllocationUnit]) -> float:
    """What a plan costs at the costs of `units`."""
    return sum(c.cost for unit in units for c in unit.candidates if c.quant_type.name == types[unit.name])


def bytes_moved(types: Types, reference: Types, units: Sequence[AllocationUnit]) -> float:
    """Share of the reference's bytes whose type differs."""
    sizes = {(unit.name, c.quant_type.name): c.size_bytes for unit in units for c in unit.candidates}
    moved = sum(sizes[name, kind] for name, kind in reference.items() if types[name] != kind)
    return moved / sum(sizes[name, kind] for name, kind in reference.items())


def costs_off(units: Sequence[AllocationUnit], reference: Sequence[AllocationUnit]) -> float:
    """Absolute difference of the costs, over the sum of the reference's."""
    ours, theirs = (np.array([c.cost for unit in some for c in unit.candidates]) for some in (units, reference))
    return float(np.abs(ours - theirs).sum() / theirs.sum())


def compared(
    planner: Planner,
    pieces: Mapping[Piece, SensitivityTable],
    subset: tuple[list[int], list[int]],
    whole: Sequence[AllocationUnit],
    best_plans: Sequence[Types],
) -> list[Agreement]:
    """One replicate's plans at every budget, against the costs of all pieces and the best plans for them."""
    inside = {piece for piece in pieces if piece[0] in subset[0] and piece[1] in subset[1]}
    parts_left = {piece for piece in pieces if piece[0] not in subset[0]}
    outside = parts_left or pieces.keys() - inside
    units = planner.units(combined([pieces[piece] for piece in sorted(inside)]))
    unseen = planner.units(combined([pieces[piece] for piece in sorted(outside)])) if outside else None
    unseen_plans = planner.plans(unseen) if unseen else [None] * len(planner.bpws)
    off = costs_off(units, whole)
    agreements = []
    for plan, best, best_unseen in zip(planner.plans(units), best_plans, unseen_plans, strict=True):
        regret = cost_of(plan, whole) / cost_of(best, whole) - 1
        on_unseen = None
        if unseen and best_unseen:
            on_unseen = cost_of(plan, unseen) / cost_of(best_unseen, unseen) - 1
        agreements.append(Agreement(off, bytes_moved(plan, best, whole), regret, regret, on_unseen))
    return agreements


def mean_of(agreements: Sequence[Agreement]) -> Agreement:
    """Means, and the largest regret."""
    unseen = [one.unseen for one in agreements if one.unseen is not None]
    return Agreement(
        costs_off=float(np.mean([one.costs_off for one in agreements])),
        bytes_moved=float(np.mean([one.bytes_moved for one in agreements])),
        regret=float(np.mean([one.regret for one in agreements])),
        worst=max(one.worst for one in agreements),
        unseen=float(np.mean(unseen)) if unseen else None,
    )


def results(
    planners: Mapping[str, Planner], pieces: Mapping[Piece, SensitivityTable], parts: int, batches: Sequence[int]
) -> Iterator[Result]:
    """Every share of the samples with every number of draws that the pieces can be put together to."""
    everything = combined(list(pieces.values()))
    whole = {name: planner.units(everything) for name, planner in planners.items()}
    best = {name: planner.plans(whole[name]) for name, planner in planners.items()}
    for share in SHARES:
        for draws in (*DRAWS, sum(batches)):
            chosen = list(subsets(parts, batches, share, draws))
            if chosen:
                by_granularity = {
                    name: mean_of(
                        [
                            agreement
                            for subset in chosen
                            for agreement in compared(planner, pieces, subset, whole[name], best[name])
                        ]
                    )
                    for name, planner in planners.items()
                }
                yield Result(share, draws, len(chosen), **by_granularity)


def main() -> None:
    """Measure, print, and write the results."""
    parser = command_parser(__doc__)
    add_measured_folder(parser, "calibrate")
    add_json(parser)
    parser.add_argument("--bpw", nargs="+", type=float, default=[2.9, 3.0, 3.2, 3.5])
    parser.add_argument("--parts", type=int, default=8, help="into how many parts the samples are dealt")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 1, 1, 3, 3, 3], help="draws of each batch")
    arguments = parser.parse_args()
    run = pipeline.open_model(arguments.checkpoint, arguments.out)
    pieces = measured_pieces(run, arguments.parts, arguments.batches)
    tensors, template = text_tensors(run.checkpoint), next(iter(pieces.values()))
    planners = {name: Planner(tensors, template, name, arguments.bpw) for name in GRANULARITIES}
    table = Table("samples", "draws", "runs", title=run.checkpoint.name)
    for name in GRANULARITIES:
        for column in ("costs off", "bytes", "regret", "worst", "unseen"):
            table.add_column(f"{name}\n{column}", justify="right")
    found = []
    for result in results(planners, pieces, arguments.parts, arguments.batches):
        found.append(result)
        cells = [
            "" if value is None else f"{100 * value:.2f} %"
            for agreement in (result.tensor, result.expert)
            for value in asdict(agreement).values()
        ]
        table.add_row(f"{result.share:g}", str(result.draws), str(result.replicates), *cells)
    Console(width=140).print(table)
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
