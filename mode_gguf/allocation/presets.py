"""Named ways of measuring, weighing and budgeting: ours, the paper's, and the one the paper is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mode_gguf.allocation.costs import CostModel
from mode_gguf.errors import UsageError

Metric: TypeAlias = Literal["fisher", "expert-mse", "block-mse", "imatrix-error"]
"""Sensitivity metrics, named as in `importance.table.METHODS`, which this package may not import."""

Scope: TypeAlias = Literal["model", "layer"]
"""Whether the whole model shares one budget, or every layer's experts have one of their own, of equal
bits per weight."""

DenseRule: TypeAlias = Literal["measured", "fixed"]
"""Whether attention, embedding and output are units of the programme, or all take one type, Q4_K where the budget
allows."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named way of making a plan.

    Attributes:
        method: the sensitivity metric it needs.
        costs: how that becomes costs.
        scope, dense: see `Scope` and `DenseRule`; a layer's own budget leaves nothing for measured dense tensors, so
            `layer` goes with `fixed`.
        unit_kl: take whole tensors' costs from `unit-kl`, shared out over experts in the proportions of the metric.
        equality: use the whole budget, as the paper does: the greatest size that can be reached exactly.
    """

    name: str
    method: Metric
    costs: CostModel = field(default_factory=CostModel)
    scope: Scope = "model"
    dense: DenseRule = "measured"
    equality: bool = False
    unit_kl: bool = False

    def __post_init__(self) -> None:
        if self.scope == "layer" and self.dense == "measured":
            raise UsageError("a budget per layer needs --dense fixed: measured attention has no budget of its own")


PAPER_COSTS = CostModel("product", modality_weights=(1.0, 1.0, 0.0))
"""Frequency times expert error over text and key vision tokens; redundant vision tokens count for nothing."""

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("mode", "fisher"),
        Preset("paper", "expert-mse", PAPER_COSTS, scope="layer", dense="fixed", equality=True),
        Preset("pmq", "expert-mse", CostModel("pmq"), scope="layer", dense="fixed", equality=True),
    )
}
