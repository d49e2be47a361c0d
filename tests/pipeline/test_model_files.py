"""Choice of the files to serve from a folder."""

import os
from pathlib import Path

import pytest
from gguf import GGUFWriter, LlamaFileType

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan, Provenance
from mode_gguf.errors import InputError
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.pipeline import find_model_files

Q3 = LlamaFileType.MOSTLY_Q3_K_M


def gguf(path: Path, age: int = 0, file_type: LlamaFileType = Q3) -> Path:
    """Nothing but a head; `age` seconds old."""
    writer = GGUFWriter(path, "qwen3vlmoe")
    writer.add_file_type(file_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def save_plan(folder: Path, bpw: float = 3.0, fit: FitSettings | None = None) -> Plan:
    budget = Budget(kind="fit", value=2**34, fit=fit) if fit else Budget(value=bpw)
    made_from = Provenance(tool_version="0", model="M", model_fingerprint="0")
    plan = Plan(
        made_from=made_from,
        preset="mode",
        budget=budget,
        bpw=bpw,
        experts_bpw=bpw,
        size_bytes=1,
        main_type="Q3_K",
        tensors=[],
    )
    plan.save(folder / "plan.json")
    return plan


def test_the_model_of_the_plan_is_taken(tmp_path: Path) -> None:
    planned = gguf(tmp_path / "M-MODE-3.00bpw-Q3_K_MODE.gguf", age=9)
    gguf(tmp_path / "M-MODE-4.00bpw-Q4_K_MODE.gguf")
    gguf(tmp_path / "imatrix-M.gguf")
    mmproj = gguf(tmp_path / "mmproj-M-F16.gguf")
    plan = save_plan(tmp_path)
    pair = find_model_files(tmp_path)
    assert (pair.model, pair.mmproj, pair.plan, pair.fit) == (planned, mmproj, plan, None)
    (remark,) = pair.notes
    assert "of 2 models" in remark
    assert "the one of plan.json is taken: M-MODE-3.00bpw" in remark


def test_without_a_plan_the_newest_that_is_not_full_precision(tmp_path: Path) -> None:
    gguf(tmp_path / "M-BF16.gguf", file_type=LlamaFileType.MOSTLY_BF16)
    gguf(tmp_path / "M-old.gguf", age=9)
    newest = gguf(tmp_path / "M-new.gguf", age=5)
    pair = find_model_files(tmp_path)
    assert (pair.model, pair.mmproj, pair.plan) == (newest, None, None)
    assert "the newest is taken: M-new.gguf" in pair.notes[0]
    assert "no projector" in pair.notes[1]


def test_a_plan_whose_file_is_not_there_yet_says_nothing(tmp_path: Path) -> None:
    only = gguf(tmp_path / "M-MODE-3.00bpw-Q3_K_MODE.gguf")
    gguf(tmp_path / "mmproj-M-F16.gguf")
    save_plan(tmp_path, bpw=2.5, fit=FitSettings(context=4096))
    pair = find_model_files(tmp_path)
    assert (pair.model, pair.fit, pair.notes) == (only, None, ())


def test_shards_and_projectors_of_the_plan(tmp_path: Path) -> None:
    first = gguf(tmp_path / "M-MODE-3.00bpw-Q3_K_MODE-00001-of-00002.gguf", age=3)
    gguf(tmp_path / "M-MODE-3.00bpw-Q3_K_MODE-00002-of-00002.gguf")
    planned = gguf(tmp_path / "mmproj-M-Q8_0.gguf", age=7)
    gguf(tmp_path / "mmproj-M-F16.gguf")
    fit = FitSettings(context=4096, projector_type="Q8_0")
    save_plan(tmp_path, fit=fit)
    pair = find_model_files(tmp_path)
    assert (pair.model, pair.mmproj, pair.fit) == (first, planned, fit)
    assert pair.notes == ("of 2 projectors mmproj-M-Q8_0.gguf is taken",)


def test_nothing_to_serve(tmp_path: Path) -> None:
    gguf(tmp_path / "mmproj-M-F16.gguf")
    with pytest.raises(InputError, match="holds no GGUF model"):
        find_model_files(tmp_path)
