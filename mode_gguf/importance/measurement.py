"""What both ways of measuring sensitivity are told and give back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mode_gguf.importance.imatrix import Importance
from mode_gguf.quantization.types import QuantType


@dataclass(frozen=True, slots=True)
class MeasurementSettings:
    """What is measured.

    Attributes:
        expert_types: candidates of expert tensors; dense_types: of all other matrices.
        importance: they are packed with.
        key_ratio: share of the vision tokens that are key.
        draws: label draws per scored position; seed: of the draws. Only Fisher sensitivity draws.
    """

    expert_types: Sequence[QuantType]
    dense_types: Sequence[QuantType]
    importance: Importance
    key_ratio: float
    draws: int
    seed: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """Arrays, scored positions per kind of answer, and experts whose values are estimates; see `SensitivityTable`."""

    arrays: dict[str, np.ndarray]
    positions: tuple[int, ...]
    estimated: dict[str, list[int]]
