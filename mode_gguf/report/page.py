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
from mode_gguf.validation.report import Answer, Divergence, ValidationReport

WIDEST_USE = 3
"""Powers of two of the average at the ends of a heatmap's colours: an eighth to eight times."""
KEPT_TYPE = "F32"
SAME_BPW = 1e-6
_HERE = Path(__file__).parent


def draw(facts: ConversionRecord, validation: ValidationReport | None, pictures: Mapping[tuple[str, str], Path]) -> str:
    """HTML of the report.

    Args:
        validation: None where nothing was measured. One of another file than the plan's is mentioned, and not shown.
        images: files by name of the image and question, as far as they can be found.
    """
    other = validation if validation and not is_of_plan(validation, facts) else None
    shown = None if other else validation
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= wording.FILTERS
    return environment.get_template("page.html.jinja").render(
        facts=facts,
        validation=shown,
        other=other,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        warnings=dict.fromkeys(
            [*(shown.warnings if shown else ()), *(facts.calibration.warnings if facts.calibration else ())]
        ),
        parts=[(name, part) for name, part in _divergences(shown)],
        gaps=_gaps(facts, shown),
        charts=_charts(facts, shown),
        examples=[_example(answer, pictures) for answer in examples(shown.answers)] if shown else [],
        type_map=_type_map(facts),
        shares=_shares(facts),
        routing=[_routing(one, facts) for one in facts.calibration.routing] if facts.calibration else [],
        costs=_cost_map(facts),
        stages=_stages(facts, shown),
        commands=_commands(facts),
        colours=colours,
        version=__version__,
    )


def is_of_plan(validation: ValidationReport, facts: ConversionRecord) -> bool:
    """Whether a validation is of the record's file: its bits per weight are the plan's.

    Without a plan there is nothing to tell them apart by.
    """
    return facts.plan is None or same_bpw(validation.candidate.bpw, facts.plan.bpw)


def same_bpw(first: float, second: float) -> bool:
    """Whether two values of bits per weight are equal up to rounding errors of the sums."""
    return abs(first - second) < SAME_BPW


def _divergences(validation: ValidationReport | None) -> list[tuple[str, Divergence]]:
    if validation is None:
        return []
    return [(name, part) for name, part in (("text", validation.text), ("image", validation.image)) if part]


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


def _gaps(facts: ConversionRecord, validation: ValidationReport | None) -> list[_Gap]:
    if facts.prediction is None or facts.prediction.this is None:
        return []
    measured = dict(_divergences(validation))
    return [
        _Gap(answer, predicted, part.kl_mean, part.kl_mean_error or 0.0)
        for answer, predicted in zip(facts.prediction.answers, facts.prediction.this, strict=True)
        if (part := measured.get(answer)) is not None and part.kl_mean is not None
    ]


def _charts(facts: ConversionRecord, validation: ValidationReport | None) -> list[dict[str, Any]]:
    """A frontier per kind of answer."""
    if facts.prediction is None or facts.plan is None:
        return []
    measured = {gap.answer: gap.measured for gap in _gaps(facts, validation)}
    charts = []
    for index, answer in enumerate(facts.prediction.answers):
        marks = []
        if facts.prediction.this is not None and facts.prediction.this[index] > 0:
            value = facts.prediction.this[index]
            marks.append(Mark(facts.plan.size_bytes, value, f"this file, predicted: {value:.4g}", "this"))
        if measured.get(answer, 0) > 0:
            value = measured[answer]
            marks.append(Mark(facts.plan.size_bytes, value, f"this file, measured: {value:.4g}", "measured"))
        drawing = frontier_chart(facts.prediction.planned, facts.uniform, index, marks)
        if drawing:
            charts.append({"answer": answer, "drawing": drawing, "width": WIDTH, "height": HEIGHT})
    return charts


def _example(answer: Answer, pictures: Mapping[tuple[str, str], Path]) -> dict[str, Any]:
    path = pictures.get((answer.image, answer.question))
    return {"answer": answer, "picture": thumbnail(path) if path else None}


def _type_map(facts: ConversionRecord) -> dict[str, Any]:
    """Rows of layers, columns of what is packed in them; tensors outside of all layers apart."""
    packed = [tensor for tensor in (facts.plan.types if facts.plan else ()) if set(tensor.types) != {KEPT_TYPE}]
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


def _shares(facts: ConversionRecord) -> list[dict[str, Any]]:
    """Weights and bytes by type."""
    if facts.plan is None:
        return []
    weights: dict[str, float] = {}
    for tensor in facts.plan.types:
        for name, count in tensor.types.items():
            part = tensor.n_weights * count / sum(tensor.types.values())
            weights[name] = weights.get(name, 0.0) + part
    sizes = {name: part * QUANT_TYPES[name].bits_per_weight / 8 for name, part in weights.items()}
    total = sum(sizes.values())
    return [
        {
            "type": name,
            "bits": QUANT_TYPES[name].bits_per_weight,
            "weights": weights[name] / facts.plan.n_weights,
            "bytes": sizes[name],
            "share": sizes[name] / total,
        }
        for name in sorted(weights, key=lambda name: QUANT_TYPES[name].bits_per_weight)
    ]


def _routing(routing: Routing, facts: ConversionRecord) -> dict[str, Any]:
    """A heatmap of use over average use, and each layer in numbers."""
    assert facts.calibration is not None
    positions, rows = [], []
    for layer, tokens in zip(facts.calibration.layers, routing.tokens, strict=True):
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
    return {"routing": routing, "picture": heatmap(positions) if total else None, "rows": rows, "experts": total}


def _cost_map(facts: ConversionRecord) -> dict[str, Any] | None:
    """A heatmap of what every expert's smallest type would cost, on a logarithmic scale."""
    if facts.sensitivity is None:
        return None
    costs = [cost for row in facts.sensitivity.by_expert for cost in row if cost > 0]
    if not costs:
        return None
    lowest, highest = math.log10(min(costs)), math.log10(max(costs))
    span = highest - lowest or 1.0
    positions = [
        [(math.log10(cost) - lowest) / span if cost > 0 else math.nan for cost in row]
        for row in facts.sensitivity.by_expert
    ]
    return {"picture": heatmap(positions), "lowest": min(costs), "highest": max(costs)}


def _stages(facts: ConversionRecord, validation: ValidationReport | None) -> list[dict[str, Any]]:
    """Stages with their seconds, those of validation last, and their share of the longest."""
    rows = [(run.name, run.seconds) for run in facts.stages]
    if validation:
        rows += [(f"validate: {part}", seconds) for part, seconds in validation.seconds.items()]
    longest = max((seconds for _, seconds in rows), default=0.0) or 1.0
    return [{"name": name, "seconds": seconds, "part": seconds / longest} for name, seconds in rows]


def _commands(facts: ConversionRecord) -> list[tuple[str, Sequence[str]]]:
    """Commands in the order of the first stage that each ran, with all of them."""
    stages: dict[str, list[str]] = {}
    for run in facts.stages:
        if run.command:
            stages.setdefault(run.command, []).append(run.name)
    return list(stages.items())
