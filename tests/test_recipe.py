"""Recipes: layers that override each other, refusals that name what is wrong, and files that are read as written."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf.errors import InputError, UsageError
from mode_gguf.options import CalibrationOptions, Packing
from mode_gguf.recipe import (
    PRESET_NAMES,
    OptionLayer,
    Recipe,
    commented_lines,
    nested,
    preset_layer,
    read_recipe,
    settings_layer,
)

PRINTABLE = st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"))


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_last_layer_wins_and_the_others_keep_the_rest(tmp_path: Path) -> None:
    file = written(tmp_path, "preset: paper\nplan:\n  refine: 2\n  costs: {pooled: true}\ncalibration: {seed: 5}\n")
    recipe = Recipe.of(read_recipe(file), settings_layer(["plan.refine=3", "sensitivity.packing.mode=exact"]))
    assert (recipe.preset, recipe.plan.refine, recipe.calibration.seed) == ("paper", 3, 5)
    assert (recipe.plan.costs.pooled, recipe.plan.costs.combination, recipe.plan.scope) == (True, "product", "layer")
    assert recipe.sensitivity.packing == Packing("exact")
    assert Recipe.of(OptionLayer({"preset": "mode"})) == Recipe()


def test_values_as_people_write_them() -> None:
    recipe = Recipe.of(
        settings_layer(
            [
                *("plan.budget.size=12GiB", "sensitivity.types=Q2_K, Q4_K", "plan.costs.answer_weights=1,0.5"),
                *("plan.floors.output=Q6_K", "plan.floors={expert: Q3_K}", "validation.placement.tensor_split=[3, 1]"),
            ]
        )
    )
    assert recipe.plan.budget.size == 12 << 30
    assert recipe.sensitivity.types == ("Q2_K", "Q4_K")
    assert recipe.plan.costs.answer_weights == (1.0, 0.5)
    assert recipe.plan.floors == {"output": "Q6_K", "expert": "Q3_K"}
    assert recipe.validation.placement.tensor_split == (3.0, 1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.budge.bpw=3", r"^plan\.budge: no such option; did you mean budget\?"),
        ("calibraton.seed=1", r"^calibraton: no such option; did you mean calibration\?"),
        ("plan.budget.bpw=-1", r"^plan\.budget\.bpw: .*greater than 0; found -1"),
        ("plan.budget.bpw=.inf", r"^plan\.budget\.bpw: .*finite"),
        ("plan.budget.size=24potatoes", r"^plan\.budget\.size: a number with GB.*found '24potatoes'"),
        ("calibration.key_tokens=some", r"^calibration\.key_tokens: .*'text-attention'.*; found 'some'"),
        ("sensitivity.packing.size_power=0.3", r"size_power: 0, 0\.5, 1, \.\.\. 4 expected; found 0\.3"),
        ("plan=3", r"^plan: "),
        ("preset=best", r"^preset: Input should be 'mode', 'paper' or 'pmq'; found 'best'"),
        ("plan.refine", r"--set plan\.refine: write an option of the recipe, = and its value"),
    ],
)
def test_what_is_wrong_on_a_command_line_is_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.of(settings_layer([setting]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan: {granularty: expert}", r"recipe\.yaml: plan\.granularty: no such option; did you mean granularity\?"),
        ("calibration: {image_samples: many}", r"recipe\.yaml: calibration\.image_samples: .*found 'many'"),
        ("- plan", r"recipe\.yaml: options by name expected, list found"),
        ("plan: [", r"recipe\.yaml: not valid YAML"),
        ("a: &a [*a]", r"recipe\.yaml: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.of(read_recipe(written(tmp_path, text)))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        read_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="2,097,152 bytes, a recipe of at most 1,048,576 expected"):
        read_recipe(tmp_path / "large.yaml")


def test_the_label_of_a_command_line_is_said(tmp_path: Path) -> None:
    layer = OptionLayer(nested(("plan", "budget", "bpw"), 0), labels={("plan", "budget", "bpw"): "--bpw"})
    with pytest.raises(UsageError, match=r"^--bpw: "):
        Recipe.of(OptionLayer({}, written(tmp_path, "")), layer)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_shipped_recipes_are_read_as_written(name: str, tmp_path: Path) -> None:
    recipe = Recipe.of(preset_layer(name))
    assert recipe.preset == name
    recipe.save(tmp_path / "whole.yaml")
    assert Recipe.of(read_recipe(tmp_path / "whole.yaml")) == recipe


@settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "plan.budget.bpw": st.floats(0.1, 16),
            "plan.budget.size": st.integers(1, 2**50),
            "plan.costs.frequency_floor": st.floats(0, 1),
            "calibration.source": st.text(PRINTABLE),
            "calibration.seed": st.integers(0, 2**32 - 1),
            "checkpoint.pre_tokenizer": st.text(
                st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs", "Cc")), min_size=1
            ),
            "plan.floors": st.dictionaries(st.sampled_from(["expert", "output"]), st.sampled_from(["Q4_K", "Q6_K"])),
            "validation.validate": st.booleans(),
        },
    )
)
def test_any_recipe_is_read_as_written(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    merged: dict[str, Any] = {}
    for name, value in values.items():
        section = merged
        *parts, last = name.split(".")
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    recipe = Recipe.of(OptionLayer(merged))
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.save(path)
    assert Recipe.of(read_recipe(path)) == recipe


def test_every_option_is_explained() -> None:
    lines = list(commented_lines(Recipe()))
    for number, line in enumerate(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("#"), line
    assert max(map(len, lines)) <= 120
    assert "  image_samples: 128" in lines
    assert CalibrationOptions.image_samples == 128


def test_a_local_source_is_right_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.of(settings_layer(["calibration.source=samples"]))
    assert recipe.calibration.source == str(tmp_path / "samples")
    assert Recipe.of(settings_layer(["calibration.source=org/dataset"])).calibration.source == "org/dataset"
