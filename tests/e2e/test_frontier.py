"""The frontier of measured and of unmeasured models, from the command line."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mode_gguf import pipeline
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.options import CalibrationOptions, ComputeOptions, SensitivityOptions
from mode_gguf.quantization.packing import EXACT
from tests.e2e.conftest import Run, settings


@pytest.fixture(scope="module")
def out(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder where the pico model was measured."""
    run = pipeline.open_model(pico, tmp_path_factory.mktemp("frontier"))
    options = CalibrationOptions(image_samples=2, text_samples=2)
    calibrate = pipeline.Calibrate(options, ComputeOptions(device="cpu"))
    run.ensure(calibrate, pipeline.MeasureSensitivity.of(calibrate, SensitivityOptions(packing=EXACT), DEFAULT_TYPES))
    return run.folder.path


def test_frontier_of_a_measured_model(pico: Path, out: Path, run: Run) -> None:
    plan = json.loads(run("plan", pico, "--out", out, "--bpw", "4.0", "--json"))
    found = json.loads(run("frontier", pico, "--out", out, "--points", "5", "--json"))
    assert json.loads((out / "frontier.json").read_text()) == found
    assert len(found["points"]) == 5
    near = min(found["points"], key=lambda point: abs(point["bpw"] - plan["bpw"]))
    assert sum(near["predicted"]) == pytest.approx(plan["predicted_cost"], rel=0.5)

    printed = run("frontier", pico, "--out", out, *settings("sensitivity.types=Q2_K,Q3_K"), "--points", "3")
    drawing = ElementTree.parse(out / "frontier.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Q2_K", "Q3_K", "KL of image answers, predicted, nats per token"} <= set(texts)
    assert [printed.count(word) for word in ("planned ", "all Q2_K", "all Q3_K", "all Q4_K")] == [3, 1, 1, 0]
    assert {"text KL", "image KL", "bpw"} <= {title.strip() for title in printed.splitlines()[1].split("  ")}
    assert str(out / "frontier.svg") in printed


def test_frontier_of_what_was_measured_otherwise(pico: Path, out: Path, run: Run) -> None:
    assert "not measured at IQ4_XS" in run(
        "frontier", pico, "--out", out, *settings("sensitivity.types=Q2_K,IQ4_XS"), code=4
    )
    assert "--preset" in run("frontier", pico, "--out", out, "--preset", "paper", code=2)


def test_frontier_without_measurements(pico: Path, tmp_path: Path, run: Run) -> None:
    assert "sensitivity.safetensors" in run("frontier", pico, "--out", tmp_path, code=4)
    assert list(tmp_path.iterdir()) == []
