"""Refined packing: less of the error it minimises, whatever it is given."""

from itertools import pairwise

import numpy as np
import pytest

from mode_gguf_kernels import PackingError, Refinement, pack, unpack
from tests.kernels import inputs

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
SHAPE = 64, 512


def weighted_error(
    matrix: np.ndarray, packed: np.ndarray, type_name: str, importance: np.ndarray, power: float
) -> float:
    """Sum of importance * (variance + x^2)^power * error^2, as `refine.error_weights` has it."""
    blocks = matrix.astype(np.float64).reshape(-1, 256)
    size = (blocks**2 + np.mean(blocks**2, axis=1, keepdims=True)).reshape(matrix.shape)
    error = unpack(packed, type_name, matrix.shape[1]) - matrix.astype(np.float64)
    return float(np.sum(importance * size**power * error**2))


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.random.default_rng(1).standard_t(5, SHAPE).astype(np.float32) * np.float32(0.02)


@pytest.fixture(scope="module")
def importance() -> np.ndarray:
    return (np.random.default_rng(2).standard_normal(SHAPE[1]) ** 2 + 1e-3).astype(np.float32)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("type_name", TYPES)
def test_it_leaves_less_of_the_error_it_minimises(
    matrix: np.ndarray, importance: np.ndarray, type_name: str, power: float
) -> None:
    refined = pack(matrix, type_name, importance, refinement=Refinement(size_power=power, unbiased=False))
    exact = pack(matrix, type_name, importance)
    # ggml weighs errors with power 0.5 in most types and 0 in Q6_K; its margin is smallest there.
    assert weighted_error(matrix, refined, type_name, importance, power) < weighted_error(
        matrix, exact, type_name, importance, power
    )


@pytest.mark.parametrize("type_name", TYPES)
def test_more_effort_leaves_less(matrix: np.ndarray, importance: np.ndarray, type_name: str) -> None:
    errors = [
        weighted_error(
            matrix,
            pack(matrix, type_name, importance, refinement=Refinement(effort, unbiased=False)),
            type_name,
            importance,
            0.0,
        )
        for effort in ("fast", "default", "max")
    ]
    assert all(less < more for more, less in pairwise(errors)), errors


@pytest.mark.parametrize("type_name", TYPES)
def test_without_importance_all_columns_count_alike(matrix: np.ndarray, type_name: str) -> None:
    ones = np.ones(SHAPE[1], np.float32)
    np.testing.assert_array_equal(
        pack(matrix, type_name, refinement=Refinement()), pack(matrix, type_name, ones, refinement=Refinement())
    )


@pytest.mark.parametrize("type_name", TYPES)
def test_what_it_packs_is_finite_and_near(type_name: str) -> None:
    """Of zeros, outliers, denormals, weights beyond float16 ...: never worse than storing zeros throughout."""
    for name, draw in inputs.DISTRIBUTIONS.items():
        weights = np.asarray(draw(np.random.default_rng(3), 8, 256), np.float32)
        unpacked = unpack(pack(weights, type_name, refinement=Refinement()), type_name, 256)
        assert np.isfinite(unpacked).all(), name
        exact = np.sum((weights.astype(np.float64)) ** 2, axis=1)
        error = np.sum((unpacked - weights.astype(np.float64)) ** 2, axis=1)
        assert (error <= exact).all(), name


def test_q8_0_has_nothing_to_refine(matrix: np.ndarray) -> None:
    np.testing.assert_array_equal(pack(matrix, "Q8_0", refinement=Refinement()), pack(matrix, "Q8_0"))


def test_unusable_settings_are_named(matrix: np.ndarray) -> None:
    with pytest.raises(PackingError, match=r"size power 0\.3: a multiple of 0\.5"):
        pack(matrix, "Q2_K", refinement=Refinement(size_power=0.3))
    with pytest.raises(PackingError, match="effort 'much': one of fast, default, max"):
        pack(matrix, "Q2_K", refinement=Refinement(effort="much"))  # type: ignore[arg-type]


@pytest.mark.parametrize("type_name", TYPES)
def test_outputs_keep_their_size(matrix: np.ndarray, importance: np.ndarray, type_name: str) -> None:
    """<q, x> = <x, x> of a super-block, weighted with the importance; least squares alone falls short of it."""

    def gains(unbiased: bool) -> np.ndarray:
        packed = pack(matrix, type_name, importance, refinement=Refinement(unbiased=unbiased))
        products = importance * matrix * unpack(packed, type_name, SHAPE[1])
        squares = importance * matrix**2
        gain: np.ndarray = products.reshape(-1, 256).sum(axis=1) / squares.reshape(-1, 256).sum(axis=1)
        return gain

    np.testing.assert_allclose(gains(unbiased=True), 1, atol=2e-3)  # d is rounded to float16, at times a denormal one
    assert gains(unbiased=False).mean() < gains(unbiased=True).mean() - 1e-4
