"""A stage runs again exactly when its settings changed or its outputs are not what it left."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.errors import UsageError
from mode_gguf.pipeline.stage_cache import StageCache, StageState
from mode_gguf.workfolder import WorkFolder


@pytest.fixture
def folder(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path / "work", "pico")
    folder.path.mkdir()
    with StageCache(folder).recorded(stage(folder)):
        folder.plan.write_text("{}")
    return folder


def stage(folder: WorkFolder, name: str = "plan", **settings: Any) -> StageState:
    return StageState(
        name, {"text samples": 128, "types": ("Q2_K", "Q3_K"), **settings}, (folder.plan, folder.tensor_types)
    )


def test_finished_stage_is_remembered_with_its_settings(folder: WorkFolder) -> None:
    assert StageCache(folder).is_current(stage(folder))
    assert StageCache(folder).seconds("plan") > 0
    entry = json.loads(folder.stages.read_text())["plan"]
    assert entry["settings"] == {"text samples": 128, "types": ["Q2_K", "Q3_K"]}
    assert set(entry["outputs"]) == {"plan.json", "tensor-types.txt"}


def test_a_folder_may_be_moved(folder: WorkFolder) -> None:
    moved = WorkFolder(folder.path.with_name("moved"), "pico")
    shutil.copytree(folder.path, moved.path)
    assert StageCache(moved).is_current(stage(moved))


def test_other_settings_or_outputs_make_it_run_again(folder: WorkFolder) -> None:
    cache = StageCache(folder)
    assert not cache.is_current(stage(folder, types=("Q2_K",)))
    assert not cache.is_current(stage(folder, "calibrate"))
    assert cache.edited(stage(folder)) == []
    folder.plan.write_text("[]")  # as long as before
    assert not cache.is_current(stage(folder))
    assert cache.edited(stage(folder)) == [folder.plan]
    folder.plan.unlink()
    assert not cache.is_current(stage(folder))
    assert cache.edited(stage(folder)) == []


def test_a_stage_that_begins_is_forgotten_until_it_has_finished(folder: WorkFolder) -> None:
    with StageCache(folder).recorded(stage(folder)):
        assert not StageCache(folder).is_current(stage(folder)), "its outputs may be half of one run, half of another"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"plan": {"inputs": "abc"}}'])
def test_unreadable_cache_means_starting_over(folder: WorkFolder, text: str) -> None:
    folder.stages.write_text(text)
    assert not StageCache(folder).is_current(stage(folder))
    StageCache(folder).check_unchanged([stage(folder, seed=1)])


def test_caches_of_one_folder_keep_each_others_entries(folder: WorkFolder) -> None:
    cache = StageCache(folder)
    with cache.recorded(stage(folder, "validate")), StageCache(folder).recorded(stage(folder, "reference")):
        pass
    for name in ("reference", "validate", "plan"):
        assert StageCache(folder).is_current(stage(folder, name))


def test_changed_settings_are_named_with_both_values(folder: WorkFolder) -> None:
    cache = StageCache(folder)
    cache.check_unchanged([stage(folder), stage(folder, "sensitivity")])
    changed = {"text samples": 64, "types": ("Q2_K",), "seed": 1}
    with pytest.raises(UsageError) as error:
        cache.check_unchanged([replace(stage(folder), settings=changed)])
    said = "(text samples: 128 then, 64 now; types: Q2_K Q3_K then, Q2_K now; seed: none then, 1 now)"
    assert said in str(error.value)
    assert "--restart" in str(error.value)


def test_an_edited_measurement_is_refused_and_a_removed_one_is_not(folder: WorkFolder) -> None:
    folder.plan.write_text("{ }")
    with pytest.raises(UsageError, match=r"plan\.json: is not what `plan` wrote"):
        StageCache(folder).check_unchanged([stage(folder)])
    folder.plan.unlink()
    StageCache(folder).check_unchanged([stage(folder)])
