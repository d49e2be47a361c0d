"""A stage runs again exactly when its inputs changed or its outputs are not what it left."""

import re
from pathlib import Path

import pytest

from mode_gguf.workfolder import StageLedger, WorkFolder, imatrix_file_name, model_file_name, projector_file_name


@pytest.fixture
def folder(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path, "pico")
    with StageLedger(folder).running("plan", "inputs", [folder.plan]):
        folder.plan.write_text("{}")
    return folder


def test_finished_stage_is_remembered_by_a_new_run(folder: WorkFolder) -> None:
    ledger = StageLedger(folder)
    assert ledger.is_current("plan", "inputs")
    assert ledger.seconds == {"plan": 0.0}


def test_other_inputs_or_outputs_make_it_run_again(folder: WorkFolder) -> None:
    assert not StageLedger(folder).is_current("plan", "other inputs")
    assert not StageLedger(folder).is_current("calibrate", "inputs")
    folder.plan.write_text("{ }")
    assert not StageLedger(folder).is_current("plan", "inputs")
    folder.plan.unlink()
    assert not StageLedger(folder).is_current("plan", "inputs")


def test_failed_stage_is_not_remembered(folder: WorkFolder) -> None:
    ledger = StageLedger(folder)
    with pytest.raises(RuntimeError), ledger.running("export", "inputs", [folder.plan]):
        raise RuntimeError
    assert not StageLedger(folder).is_current("export", "inputs")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_unreadable_ledger_means_starting_over(folder: WorkFolder, text: str) -> None:
    folder.stages.write_text(text)
    assert not StageLedger(folder).is_current("plan", "inputs")


def test_two_ledgers_of_one_folder_keep_each_others_entries(folder: WorkFolder) -> None:
    outer = StageLedger(folder)
    with outer.running("validate", "inputs", []), StageLedger(folder).running("reference", "inputs", []):
        pass
    assert StageLedger(folder).is_current("reference", "inputs")
    assert StageLedger(folder).is_current("validate", "inputs")


def test_file_names() -> None:
    name = model_file_name("Qwen3-VL-30B-A3B-Instruct", 3, "Q3_K")
    assert name == "Qwen3-VL-30B-A3B-Instruct-MODE-3.00bpw-Q3_K_MODE.gguf"
    tag = re.search(r"[-.]([A-Z0-9_]+)\.gguf$", name)
    assert tag is not None
    assert tag[1] == "Q3_K_MODE", "llama.cpp takes the tag after the last - or ."
    assert projector_file_name("M", "F16") == "mmproj-M-F16.gguf"
    assert imatrix_file_name("M") == "imatrix-M.gguf"
    assert imatrix_file_name("M", "fisher") == "imatrix-fisher-M.gguf"
