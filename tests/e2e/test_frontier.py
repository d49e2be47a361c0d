"""The frontier of measured and of unmeasured models, from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf import pipeline
from mode_gguf.allocation.units import DEFAULT_TYPES

Run = Callable[..., str]


@pytest.fixture(scope="module")
def out(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder where the pico model was measured."""
    checkpoint, folder = pipeline.open_model(pico, tmp_path_factory.mktemp("frontier"))
    chosen = pipeline.CalibrationOptions(image_samples=2, text_samples=2, device="cpu")
    pipeline.run_calibration(checkpoint, folder, chosen)
    pipeline.run_sensitivity(checkpoint, folder, chosen, "fisher", DEFAULT_TYPES)
    return folder.path


def test_frontier_of_a_measured_model(pico: Path, out: Path, tmp_path: Path, run: Run) -> None:
    plan = json.loads(run("plan", pico, "--out", out, "--bpw", "4.0", "--json"))
    found = json.loads(run("frontier", pico, "--out", out, "--points", "5", "--json", "--png", tmp_path / "other.png"))
    assert json.loads((out / "frontier.json").read_text()) == found
    assert (tmp_path / "other.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "frontier.png").exists()
    assert len(found["points"]) == 5
    near = min(found["points"], key=lambda point: abs(point["bpw"] - plan["bpw"]))
    assert sum(near["predicted"]) == pytest.approx(plan["predicted_cost"], rel=0.5)

    printed = run("frontier", pico, "--out", out, "--types", "Q2_K,Q3_K", "--points", "3")
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert [printed.count(word) for word in ("planned ", "all Q2_K", "all Q3_K", "all Q4_K")] == [3, 1, 1, 0]
    assert {"text KL", "image KL", "bpw"} <= {title.strip() for title in printed.splitlines()[1].split("  ")}
    assert str(out / "frontier.png") in printed


def test_frontier_of_what_was_measured_otherwise(pico: Path, out: Path, run: Run) -> None:
    assert "not measured at IQ4_XS" in run("frontier", pico, "--out", out, "--types", "Q2_K,IQ4_XS", code=4)
    assert "--preset" in run("frontier", pico, "--out", out, "--preset", "paper", code=2)


def test_frontier_without_measurements(pico: Path, tmp_path: Path, run: Run) -> None:
    assert "sensitivity.safetensors" in run("frontier", pico, "--out", tmp_path, code=4)
    assert list(tmp_path.iterdir()) == []
