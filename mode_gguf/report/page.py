"""report.html: one file that needs no network and no scripts, from the numbers in report.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mode_gguf import __version__
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.report import colours, wording
from mode_gguf.report.embedded_images import heatmap, thumbnail
from mode_gguf.report.examples import examples
from mode_gguf.report.frontier_chart import HEIGHT, WIDTH, Mark, frontier_chart
from mode_gguf.validation.conversion_record import ConversionRecord, Routing, TensorTypes
from mode_gguf.validation.report import Answer, ValidationReport

WIDEST_USE = 3
"""Powers of two of the average at the ends of a heatmap's colours: an eighth to eight times."""
KEPT_TYPE = "F32"
"""Type of routers, norms and biases, and of nothing else in a plan that packs anything."""
SAME_BPW = 1e-6
_HERE = Path(__file__).parent


def render_page(
    record: ConversionRecord, validation: ValidationReport | None, images: Mapping[tuple[str, str], Path]
) -> str:
    """HTML of the report.

    Args:
        validation: None where nothing was measured. One of another file than the plan's is mentioned, and not shown.
        images: files by name of the image and question, as far as they can be found.
    """
    other = validation if validation and not matches_plan(validation, record) else None
    shown = None if other else validation
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= wording.FILTERS
    return environment.get_template("page.html.jinja").render(
        record=record,
        validation=shown,
        other=other,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        warnings=dict.fromkeys(
            [*(shown.warnings if shown else ()), *(record.calibration.warnings if record.calibration else ())]
        ),
        parts=list(shown.divergences.items()) if shown else [],
        gaps=_gaps(record, shown),
        charts=_charts(record, shown),
        examples=[_example(answer, images) for answer in examples(shown.answers)] if shown else [],
        type_map=_type_map(record),
        shares=_shares(record),
        routing=[_routing(one, record) for one in record.calibration.routing] if record.calibration else [],
        costs=_cost_map(record),
        stages=_stages(record, shown),
        commands=_commands(record),
        colours=colours,
        version=__version__,
    )


def matches_plan(validation: ValidationReport, record: ConversionRecord) -> bool:
    """Whether a validation is of the record's file: its bits per weight are the plan's.

    Without a plan there is nothing to tell them apart by.
    """
    return record.plan is None or same_bpw(validation.candidate.bpw, record.plan.bpw)


def same_bpw(first: float, second: float) -> bool:
    """Whether two values of bits per weight are equal up to rounding errors of the sums."""
    return abs(first - second) < SAME_BPW


@dataclass(frozen=True, slots=True)
class _Gap:
    """Predicted beside measured KL of one kind of answer."""

    answer: str
    predicted: float
    measured: float
    error: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted if self.predicted > 0 else math.nan


def _gaps(record: ConversionRecord, validation: ValidationReport | None) -> list[_Gap]:
    if validation is None or record.prediction is None or record.prediction.this is None:
        return []
    measured = validation.divergences
    return [
        _Gap(answer, predicted, part.kl_mean, part.kl_mean_error or 0.0)
        for answer, predicted in zip(record.prediction.answers, record.prediction.this, strict=True)
        if (part := measured.get(answer)) is not None and part.kl_mean is not None
    ]


def _charts(record: ConversionRecord, validation: ValidationReport | None) -> list[dict[str, Any]]:
    """A frontier per kind of answer."""
    if record.prediction is None or record.plan is None:
        return []
    measured = {gap.answer: gap.measured for gap in _gaps(record, validation)}
    charts = []
    for index, answer in enumerate(record.prediction.answers):
        marks = []
        if record.prediction.this is not None and record.prediction.this[index] > 0:
            value = record.prediction.this[index]
            marks.append(Mark(record.plan.size_bytes, value, f"this file, predicted: {value:.4g}", "this"))
        if measured.get(answer, 0) > 0:
            value = measured[answer]
            marks.append(Mark(record.plan.size_bytes, value, f"this file, measured: {value:.4g}", "measured"))
        drawing = frontier_chart(record.prediction.planned, record.uniform, index, marks)
        if drawing:
            charts.append({"answer": answer, "drawing": drawing, "width": WIDTH, "height": HEIGHT})
    return charts


def _example(answer: Answer, images: Mapping[tuple[str, str], Path]) -> dict[str, Any]:
    path = images.get((answer.image, answer.question))
    return {"answer": answer, "image": thumbnail(path) if path else None}


def _type_map(record: ConversionRecord) -> dict[str, Any]:
    """Types by layer (rows) and packed tensor (columns); tensors outside of all layers apart."""
    packed = [tensor for tensor in (record.plan.types if record.plan else ()) if set(tensor.types) != {KEPT_TYPE}]
    layers: dict[int, dict[str, TensorTypes]] = {}
    for tensor in packed:
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, {})[tensor.part] = tensor
    names = {name for tensor in packed for name in tensor.types}
    return {
        "columns": list(dict.fromkeys(tensor.part for tensor in packed if tensor.layer is not None)),
        "rows": sorted(layers.items()),
        "outside": [tensor for tensor in packed if tensor.layer is None],
        "types": sorted(names, key=lambda name: QUANT_TYPES[name].bits_per_weight),
        "grouped": [
            (layer, next(tensor for tensor in parts.values() if len(tensor.types) > 1))
            for layer, parts in sorted(layers.items())
            if any(len(tensor.types) > 1 for tensor in parts.values())
        ],
    }


def _shares(record: ConversionRecord) -> list[dict[str, Any]]:
    """Weights and bytes by type."""
    if record.plan is None:
        return []
    weights: dict[str, float] = {}
    for tensor in record.plan.types:
        for name, count in tensor.types.items():
            part = tensor.n_weights * count / sum(tensor.types.values())
            weights[name] = weights.get(name, 0.0) + part
    sizes = {name: part * QUANT_TYPES[name].bits_per_weight / 8 for name, part in weights.items()}
    total = sum(sizes.values())
    return [
        {
            "type": name,
            "bits": QUANT_TYPES[name].bits_per_weight,
            "weights": weights[name] / record.plan.n_weights,
            "bytes": sizes[name],
            "share": sizes[name] / total,
        }
        for name in sorted(weights, key=lambda name: QUANT_TYPES[name].bits_per_weight)
    ]


def _routing(routing: Routing, record: ConversionRecord) -> dict[str, Any]:
    """A heatmap of use over average use, and each layer in numbers."""
    assert record.calibration is not None
    positions, rows = [], []
    for layer, tokens in zip(record.calibration.layers, routing.tokens, strict=True):
        average = sum(tokens) / len(tokens)
        use = [count / average if average else 0.0 for count in tokens]
        positions.append([(math.log2(one) / WIDEST_USE + 1) / 2 if one else math.nan for one in use])
        most = max(range(len(use)), key=use.__getitem__)
        rows.append(
            {
                "layer": layer,
                "most": most,
                "use": use[most],
                "never": tokens.count(0),
                "share": tokens[most] / (sum(tokens) or 1),
            }
        )
    total = sum(len(tokens) for tokens in routing.tokens)
    return {"routing": routing, "image": heatmap(positions) if total else None, "rows": rows, "experts": total}


def _cost_map(record: ConversionRecord) -> dict[str, Any] | None:
    """A heatmap of what every expert's smallest type would cost, on a logarithmic scale."""
    if record.sensitivity is None:
        return None
    costs = [cost for row in record.sensitivity.by_expert for cost in row if cost > 0]
    if not costs:
        return None
    lowest, highest = math.log10(min(costs)), math.log10(max(costs))
    span = highest - lowest or 1.0
    positions = [
        [(math.log10(cost) - lowest) / span if cost > 0 else math.nan for cost in row]
        for row in record.sensitivity.by_expert
    ]
    return {"image": heatmap(positions), "lowest": min(costs), "highest": max(costs)}


def _stages(record: ConversionRecord, validation: ValidationReport | None) -> list[dict[str, Any]]:
    """Stages with their seconds, those of validation last, and their share of the longest."""
    rows = [(run.name, run.seconds) for run in record.stages]
    if validation:
        rows += [(f"validate: {part}", seconds) for part, seconds in validation.seconds.items()]
    longest = max((seconds for _, seconds in rows), default=0.0) or 1.0
    return [{"name": name, "seconds": seconds, "part": seconds / longest} for name, seconds in rows]


def _commands(record: ConversionRecord) -> list[tuple[str, Sequence[str]]]:
    """Commands in the order of the first stage that each ran, with all of them."""
    stages: dict[str, list[str]] = {}
    for run in record.stages:
        if run.command:
            stages.setdefault(run.command, []).append(run.name)
    return list(stages.items())
