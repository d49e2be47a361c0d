"""The kernel benchmark on a matrix too small to measure anything: that it writes what it promises."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import bench_kernels
from kernel_report import POWERS
from tests.kernels import inputs
from tests.kernels.modes import EXACT, MODES


def test_the_benchmark_writes_tables_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a" / "folder"
    small = ["--rows", "4", "--columns", "256", "--repeats", "1", "--starts", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--out", str(out), "--types", "Q4_K", "Q8_0", *small])
    bench_kernels.main()

    stored = json.loads((out / "kernels.json").read_text(encoding="utf-8"))
    modes = {(mode.name, name) for mode in MODES for name in ("Q4_K", "Q8_0") if name in mode.types}
    for measured, per_mode in (("speeds", 2 * 2), ("errors", 2 * len(bench_kernels.WEIGHTS)), ("starts", 1)):
        assert {(row["mode"], row["type_name"]) for row in stored[measured]} == modes
        assert len(stored[measured]) == per_mode * len(modes)
    assert all(row["ratio"] == row["ours"] / row["libggml"] > 0 for row in stored["speeds"])
    exact = [row["ratios"] for row in stored["errors"] if row["mode"] == "exact" and row["importance"]]
    assert exact == [[1.0] * len(POWERS)] * len(exact)
    assert all(0 < row["first_calls"] < row["process"] for row in stored["starts"])

    tables = (out / "kernels.md").read_text(encoding="utf-8")
    assert tables.count("\n| Q4_K |") == sum(
        row["type_name"] == "Q4_K" for kind in ("speeds", "errors", "starts") for row in stored[kind]
    )
    assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_weighed_as_ggml_does() -> None:
    generator = np.random.default_rng(0)
    matrix, importance = inputs.weights("gaussian", generator, 3, 512), inputs.importance("squares", generator, 512)
    block = matrix[1, 256:].astype(np.float64)
    for type_name, factor in (("Q2_K", 1), ("Q4_K", 2)):
        expected = importance[256:] * np.sqrt(factor * np.mean(block**2) + block**2)
        found = bench_kernels.error_weights(matrix, importance, type_name, 0.5)[1, 256:]
        np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(
        bench_kernels.error_weights(matrix, importance, "Q4_K", 0.0), np.tile(importance, (3, 1))
    )


def test_the_exact_mode_errs_least_where_the_importance_is_given() -> None:
    generator = np.random.default_rng(1)
    matrix, importance = inputs.weights("laplace", generator, 64, 512), inputs.importance("squares", generator, 512)
    given, without = bench_kernels.errors([EXACT], matrix, "Laplace", "Q2_K", importance)
    assert given.importance
    assert given.ratios == (1.0, 1.0, 1.0)
    assert all(ratio > 1.05 for ratio in without.ratios[:2])


def test_speeds_of_packers_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(matrix: np.ndarray, type_name: str, importance: object, out: np.ndarray) -> np.ndarray:
        out[:] = 1
        return out

    monkeypatch.setattr("tests.kernels.ggml_oracle.quantize", wrong)
    matrix = inputs.weights("gaussian", np.random.default_rng(0), 2, 256)
    with pytest.raises(SystemExit, match="Q8_0: libggml and the exact mode disagree"):
        bench_kernels.speeds([EXACT], matrix, "Q8_0", None, 1, 1)
