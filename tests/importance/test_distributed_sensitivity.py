"""Calibration and sensitivity of two processes together equal those of one alone."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.forward.modality import KeyTokens
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.sensitivity import measure_sensitivity
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
from mode_gguf.importance.sensitivity_table import METHODS
from mode_gguf.options import ComputeOptions
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.vocabulary import ImatrixKind, Method
from tests.together import called_together

ROUNDING = 1e-5
"""Matrix products over other numbers of tokens differ by as much in float32."""


def assert_close(actual: np.ndarray, desired: np.ndarray, name: str) -> None:
    """Equal up to a share of each value and of the largest one: sums of opposite signs leave what rounding makes."""
    atol = ROUNDING * float(np.nanmax(np.abs(desired)))
    np.testing.assert_allclose(actual, desired, rtol=ROUNDING, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def calls(
    checkpoint: Checkpoint, samples: list[Sample], statistics: CalibrationStatistics, importance: Importance
) -> dict[str, Any]:
    """Calibration and every method of sensitivity on seven samples: one process gets four of them, the other three."""
    key_tokens = KeyTokens("random", 0.3, seed=5)
    types = [QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"]], [QUANT_TYPES["Q3_K"], QUANT_TYPES["Q8_0"]]

    def sensitivity(method: Method, imatrix: ImatrixKind = "plain") -> Any:
        request = SensitivityRequest(*types, method, imatrix, seed=3)
        of = (checkpoint, samples[:7], importance, statistics, request, ComputeOptions(device="cpu"))
        return partial(measure_sensitivity, *of)

    return {
        "calibrate": partial(calibrate, checkpoint, samples[:7], device="cpu", key_tokens=key_tokens),
        "too few": partial(calibrate, checkpoint, samples[:1], device="cpu"),
        **{method: sensitivity(method) for method in METHODS},
        "packed by fisher": sensitivity("fisher", "fisher"),
    }


@pytest.fixture(scope="module")
def together(calls: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = called_together(list(calls.values()), 2, tmp_path_factory.mktemp("together"))
    return dict(zip(calls, results, strict=True))


def test_statistics_are_those_of_one_process(calls: dict[str, Any], together: dict[str, Any]) -> None:
    alone, shared = calls["calibrate"](), together["calibrate"]
    assert shared.samples == alone.samples
    assert shared.datasets == alone.datasets
    assert list(shared.arrays) == list(alone.arrays)
    for name, array in alone.arrays.items():
        assert_close(shared.arrays[name], array, name)
        assert shared.arrays[name].dtype == array.dtype


@pytest.mark.parametrize("method", METHODS)
def test_sensitivity_is_that_of_one_process(calls: dict[str, Any], together: dict[str, Any], method: str) -> None:
    alone, shared = calls[method](), together[method]
    assert shared.table.positions == alone.table.positions
    assert shared.table.estimated == alone.table.estimated
    assert set(shared.table.arrays) == set(alone.table.arrays)
    for name, array in alone.table.arrays.items():
        assert_close(shared.table.arrays[name], array, name)
    for name, (in_sum2, counts) in alone.imatrix.items():
        assert_close(shared.imatrix[name][0], in_sum2, name)
        np.testing.assert_array_equal(shared.imatrix[name][1], counts)
    assert (shared.token_weights is None) == (alone.token_weights is None) == (method != "fisher")
    if alone.token_weights is not None:
        assert shared.token_weights.tokens == alone.token_weights.tokens
        assert set(shared.token_weights.weights) == set(alone.token_weights.weights)
        for name, weights in alone.token_weights.weights.items():
            assert_close(shared.token_weights.weights[name], weights, name)


def test_candidates_are_packed_with_the_importance_of_all_samples(
    calls: dict[str, Any], together: dict[str, Any]
) -> None:
    """Importances that differ in their last bits round a few of the hundreds of weights here otherwise."""
    alone, shared = calls["packed by fisher"]().table.arrays, together["packed by fisher"].table.arrays
    for name, array in alone.items():
        assert np.nansum(np.abs(shared[name] - array)) <= 0.01 * np.nansum(np.abs(array)), name


def test_more_processes_than_samples_are_refused(together: dict[str, Any]) -> None:
    assert together["too few"].startswith("UsageError: 1 samples cannot be shared out over 2 processes")
