"""Costs from an importance matrix alone, against what they are said to be."""

import numpy as np
import pytest

from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, SourceTensor
from mode_gguf.importance.imatrix_error import imatrix_error
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
from mode_gguf.quantization.packer import pack_matrix, unpack_matrix
from mode_gguf.quantization.types import QUANT_TYPES

EXPERT_TYPES = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"])
DENSE_TYPES = (QUANT_TYPES["Q4_K"], QUANT_TYPES["Q8_0"])


def tensor(name: str, role: Role, weights: np.ndarray, projection: str | None = None) -> SourceTensor:
    def read(index: int, rows: slice = ALL_ROWS) -> Array:
        return weights[index][rows] if role is Role.EXPERT else weights[rows]

    return SourceTensor(name, weights.shape, role, (name,), read, "seen", 0 if projection else None, projection)


def test_costs_are_shares_of_the_outputs_energy() -> None:
    rng = np.random.default_rng(0)
    up = rng.standard_normal((3, 8, 256)).astype(np.float32)
    down = rng.standard_normal((3, 4, 512)).astype(np.float32)
    odd = rng.standard_normal((4, 96)).astype(np.float32)
    importance = {
        "up": rng.uniform(0.1, 3, (3, 256)).astype(np.float32),
        "down": rng.uniform(0.1, 3, (3, 512)).astype(np.float32),
    }
    counts = np.array([5.0, 0.0, 20.0])
    table = imatrix_error(
        "m",
        "f",
        [
            tensor("up", Role.EXPERT, up, "up"),
            tensor("down", Role.EXPERT, down, "down"),
            tensor("odd", Role.DENSE, odd),
        ],
        importance,
        {0: counts},
        SensitivityRequest(EXPERT_TYPES, DENSE_TYPES),
        threads=2,
    )
    tokens = np.array([5.0, 1.0, 20.0])  # an expert without tokens counts as one
    for name, weights in (("up", up), ("down", down)):
        energy = sum(
            t * (w.astype(np.float64) ** 2 @ i).sum() for t, w, i in zip(tokens, weights, importance[name], strict=True)
        )
        for t, quant_type in enumerate(EXPERT_TYPES):
            for e in range(3):
                packed = pack_matrix(weights[e], quant_type, importance[name][e], name=name)
                change = unpack_matrix(packed, quant_type, weights.shape[2]).astype(np.float64) - weights[e]
                expected = tokens[e] * (change**2 @ importance[name][e]).sum() / energy
                assert table.arrays[f"{name}.expert"][0, 0, e, t] == pytest.approx(expected, rel=1e-6)
                relative = (change**2).sum() / (weights[e].astype(np.float64) ** 2).sum()
                assert table.arrays[f"{name}.weight_error"][e, t] == pytest.approx(relative, rel=1e-6)
    arrays = table.arrays
    np.testing.assert_allclose(arrays["up.unit"], arrays["up.expert"].sum(axis=2))
    np.testing.assert_allclose(arrays["blk.0.ffn_exps.expert"], arrays["up.expert"] + arrays["down.expert"])
    assert (arrays["up.unit"][0, 1:] == 0).all()  # nothing under the modalities that it cannot tell
    # Rows of 96 fit no block of 256: the type that stands in is measured.
    assert 0 < arrays["odd.unit"][0, 0, 1] < 1e-3 < arrays["odd.unit"][0, 0, 0] < 0.01
