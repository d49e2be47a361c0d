"""The allocation benchmark on a model too small to measure anything: that it solves and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

import bench_allocation


def test_the_benchmark_solves_all_kinds_of_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "allocation.json"
    small = ["--layers", "1", "2", "--experts", "6", "--bpw", "3.1", "4.1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_allocation", *small, "--json", str(out)])
    bench_allocation.main()
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["layers"], row["bpw"], row["budget"]) for row in rows] == [
        (layers, bpw, budget) for layers in (1, 2) for bpw in (3.1, 4.1) for budget in ("global", "per layer", "equal")
    ]
    assert all(row["gap"] <= 1e-4 and 0.99 * row["bpw"] <= row["used_bpw"] <= row["bpw"] for row in rows)
    assert capsys.readouterr().out.count("per layer") == 4
