"""The signals of a plan: how sensitivity is measured, weighed and budgeted, under the name of a preset."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from mode_gguf.allocation.costs import CostModel
from mode_gguf.errors import UsageError
from mode_gguf.options import PlanOptions
from mode_gguf.recipe import PRESET_NAMES, Recipe, preset_layer
from mode_gguf.vocabulary import BudgetScope, DenseRule, Method


@dataclass(frozen=True, slots=True)
class Preset:
    """A named way of making a plan.

    Attributes:
        method: of measuring sensitivity.
        costs: how that becomes costs.
        scope, dense: a layer's own budget leaves nothing for measured dense tensors, so `layer` goes with `fixed`.
        unit_kl: take whole tensors' costs from `unit-kl`, shared out over experts in the proportions of the method.
        equality: use the whole budget, as the paper does: the greatest size that can be reached exactly.

    Raises:
        UsageError: a budget per layer with measured dense tensors.
    """

    name: str
    method: Method
    costs: CostModel = field(default_factory=CostModel)
    scope: BudgetScope = PlanOptions.scope
    dense: DenseRule = "measured"
    equality: bool = PlanOptions.use_all
    unit_kl: bool = PlanOptions.unit_kl

    def __post_init__(self) -> None:
        if self.scope == "layer" and self.dense == "measured":
            raise UsageError("a budget per layer needs plan.dense fixed: measured attention has no budget of its own")


def preset_of(recipe: Recipe) -> Preset:
    """The signals of a recipe.

    Raises:
        UsageError: signals that do not go together.
    """
    options = recipe.plan
    return Preset(
        name=recipe.preset,
        method=recipe.sensitivity.method,
        costs=CostModel(**asdict(options.costs), seed=recipe.calibration.seed),
        scope=options.scope,
        dense=options.dense or ("fixed" if options.scope == "layer" else "measured"),
        equality=options.use_all,
        unit_kl=options.unit_kl,
    )


PRESETS: Final[Mapping[str, Preset]] = {name: preset_of(Recipe.of(preset_layer(name))) for name in PRESET_NAMES}
