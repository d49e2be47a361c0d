"""Recipes from the command line: what a run used gives the same files again, and a release throws nothing away."""

import json
from pathlib import Path

import pytest
import yaml

import mode_gguf
from mode_gguf import artifacts
from tests.e2e.conftest import Run, samples, settings

FEW = (*samples(2, 2), "--no-validate", "--json")


def test_the_recipe_of_a_run_gives_the_same_bytes(pico: Path, out: Path, tmp_path: Path, run: Run) -> None:
    chosen = settings(
        *("calibration.seed=3", "calibration.key_ratio=0.4", "sensitivity.types=Q2_K,Q4_K"),
        *("sensitivity.dense_types=Q4_K,Q6_K", "sensitivity.packing.effort=fast", "plan.costs.answer_weights=1,0.5"),
    )
    first = json.loads(run("convert", pico, "--bpw", "3.7", "--out", out, *FEW, *chosen))
    written = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    assert (written["plan"]["budget"]["bpw"], written["calibration"]["seed"]) == (3.7, 3)
    again = json.loads(run("convert", pico, "--recipe", out / "recipe.yaml", "--out", tmp_path / "again", "--json"))
    for name in ("model", "mmproj", "imatrix"):
        assert Path(first[name]).read_bytes() == Path(again[name]).read_bytes(), name
    assert Path(first["plan"]).read_text() == Path(again["plan"]).read_text()
    assert (out / "recipe.yaml").read_text() == (tmp_path / "again" / "recipe.yaml").read_text()


def test_another_version_of_the_tool_reuses_everything(
    pico: Path, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("mode_gguf", *(name for name in list(__import__("sys").modules) if name.startswith("mode_gguf."))):
        loaded = __import__("sys").modules[module]
        if hasattr(loaded, "__version__"):
            monkeypatch.setattr(loaded, "__version__", "99.0")
    assert mode_gguf.__version__ == "99.0"
    seconds = json.loads(run("convert", pico, "--recipe", out / "recipe.yaml", "--out", out, "--json"))["seconds"]
    assert set(seconds.values()) == {0.0}
    assert {"calibrate", "sensitivity", "plan", "export", "projector"} <= set(seconds)


def test_another_method_runs_its_stage_and_what_builds_on_it(
    pico: Path, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("convert", pico, "--recipe", out / "recipe.yaml", "--out", out, "--json")
    monkeypatch.setitem(artifacts.SCHEMAS, "projector", 99)
    seconds = json.loads(run(*asked))["seconds"]
    assert {stage for stage, taken in seconds.items() if taken} == {"projector"}
    monkeypatch.setitem(artifacts.SCHEMAS, "sensitivity", 99)
    line = run(*asked, code=2)
    assert "`sensitivity` was run here with other settings (sensitivity schema:" in line
    assert "99 now" in line


def test_what_is_wrong_in_a_recipe_is_one_line(pico: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("plan: {granularty: expert}\n")
    line = run("convert", pico, "--recipe", recipe, "--out", tmp_path / "out", code=4)
    assert f"{recipe}: plan.granularty: no such option; did you mean granularity?" in line
    assert "--bpw: " in run("convert", pico, "--bpw", "-1", "--out", tmp_path / "out", code=2)
    assert "did you mean refine?" in run("plan", pico, *settings("plan.refin=1"), code=2)
    assert not (tmp_path / "out").exists()


def test_the_default_recipe_is_printed_and_can_be_given_back(pico: Path, tmp_path: Path, run: Run) -> None:
    printed = run("recipe", "--preset", "paper")
    (tmp_path / "paper.yaml").write_text(printed)
    assert run("recipe", "--recipe", tmp_path / "paper.yaml") == printed
    run("recipe", "--preset", "paper", "--out", tmp_path / "file.yaml")
    assert (tmp_path / "file.yaml").read_text() == printed
