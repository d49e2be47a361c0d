"""Requests, settings and results of measuring sensitivity."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mode_gguf.forward.limits import LABEL_DRAWS
from mode_gguf.forward.modality import KeyTokens
from mode_gguf.importance.imatrix import Imatrix, Importance
from mode_gguf.options import ComputeOptions, Packing
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QuantType
from mode_gguf.vocabulary import ImatrixKind, Method


@dataclass(frozen=True, slots=True)
class SensitivityRequest:
    """Request of the sensitivity stage.

    Attributes:
        expert_types: candidates of expert tensors; dense_types: of all other matrices.
        method: `fisher` (KL, see `fisher`), `expert-mse` (the paper's recipe) or `block-mse`, see `output_error`.
        imatrix: which importance the file will be packed with; for `fisher` see `SensitivitySettings`.
        packing: how the file will be packed.
        label_draws: per scored position, and the seed of the draws; Fisher only.
    """

    expert_types: Sequence[QuantType]
    dense_types: Sequence[QuantType]
    method: Method = "fisher"
    imatrix: ImatrixKind = "plain"
    packing: Packing = EXACT
    label_draws: int = LABEL_DRAWS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SensitivitySettings:
    """Settings of a sensitivity measurement.

    Attributes:
        importance: the plain one, which candidates are packed with, except where the request's `imatrix` is `fisher`:
            experts and the output head are then packed with the Fisher importance, which is known before they are
            measured.
        key_tokens: how key vision tokens are chosen.
        hidden_bytes: memory for hidden states; see `calibrate`.
    """

    request: SensitivityRequest
    importance: Importance
    key_tokens: KeyTokens
    hidden_bytes: int = ComputeOptions.hidden_memory


@dataclass(frozen=True, slots=True)
class SensitivityResult:
    """Result of a measurement: arrays, scored positions per answer type, and estimated experts; see `SensitivityTable`.

    `imatrix` is the Fisher importance of all tensors that have an activation, `token_weights` its weights of tokens
    (see `TokenWeights`); both are empty for a method without gradients.
    """

    arrays: dict[str, np.ndarray]
    positions: tuple[int, ...]
    estimated: dict[str, list[int]]
    imatrix: Imatrix = field(default_factory=dict)
    token_weights: dict[str, np.ndarray] = field(default_factory=dict)
