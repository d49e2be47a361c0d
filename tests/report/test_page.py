"""The page: whole, alone, and honest about what it does not know."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.allocation.plan import Plan
from mode_gguf.errors import InputError
from mode_gguf.pipeline import run_report
from mode_gguf.pipeline.report_data import conversion_record, work_folder
from mode_gguf.pipeline.stage_cache import StageCache, StageState
from mode_gguf.report.embedded_images import heatmap
from mode_gguf.report.examples import examples
from mode_gguf.report.page import render_page
from mode_gguf.report.wording import duration, nats, size
from mode_gguf.validation.conversion_record import ConversionRecord
from mode_gguf.validation.report import Answer, Check, ValidationReport
from mode_gguf.workfolder import WorkFolder
from tests.report.folders import report
from tests.report.pages import SECTIONS, Page

Copied = Callable[[WorkFolder], WorkFolder]
EVIL = "<script>alert(1)</script>\"'&<img src=x>"


@pytest.fixture
def folder(drawn: WorkFolder, copied: Copied) -> WorkFolder:
    """A copy of the whole work folder."""
    return copied(drawn)


def page_of(folder: WorkFolder) -> Page:
    return Page(run_report(folder.path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["drawn", "grouped"])
def test_page_is_whole_and_alone(name: str, copied: Copied, request: pytest.FixtureRequest) -> None:
    folder = copied(request.getfixturevalue(name))
    page, source = page_of(folder), folder.page.read_text(encoding="utf-8")
    assert page.faults == []
    assert source.startswith("<!DOCTYPE html>")
    assert [one for one in page.ids if one in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.loaded)
    assert {link[1:] for link in page.loaded if link.startswith("#")} <= set(page.ids)
    assert not any(word in source for word in ("<script", "url(", "@import", "http:", "https:"))
    assert "Not shown" not in source
    assert len(source) < 100_000
    assert all(found.get("alt") for tag, found in page.tags if tag == "img")


def test_numbers_are_those_of_report_json(folder: WorkFolder) -> None:
    page, saved = page_of(folder), ValidationReport.load(folder.report)
    record = saved.conversion
    assert record == conversion_record(folder)
    assert record is not None
    assert record.plan is not None
    assert record.prediction is not None
    assert record.prediction.this is not None
    plan = Plan.load(folder.plan)
    assert plan.solver is not None
    assert sum(record.prediction.this) == pytest.approx(plan.solver.objective)
    assert f"{plan.bpw:.3f}" in page.text("size")
    for text in ("0.0321", "0.0123", "95.20 %", *map(nats, record.prediction.this)):
        assert text in page.text("quality")
    for tensor in plan.tensors:
        if "_exps" in tensor.name:
            assert tensor.type in page.text("types")
    assert "What is in picture 0?" in page.text("answers")
    assert "layer 1: no text token reached expert 3 of 8" in page.text("warnings")
    assert size(plan.size_bytes) in page.text("")
    assert sum(str(found.get("src")).startswith("data:image/webp") for tag, found in page.tags if tag == "img") == 4
    assert page.text("timings").count("62 s") == 3


def test_limits_and_what_a_server_hides(folder: WorkFolder) -> None:
    page = page_of(folder)
    assert "Limits" not in page.text("quality")
    assert "at most" not in page.text("quality")
    saved = ValidationReport.load(folder.report)
    assert saved.text is not None
    bounded = saved.text.model_copy(update={"kl_at_most": 0.0456})
    checks = (
        Check(option="--max-kl", limit=0.04, found=0.0456, kept=False),
        Check(option="--min-top1", limit=0.9, found=0.952, kept=True),
    )
    saved.model_copy(update={"text": bounded, "checks": checks}).save(folder.report)
    quality = " ".join(page_of(folder).text("quality").split())
    assert "at most, counting what the server did not list 0.0456" in quality
    assert "--max-kl 0.04 0.0456 broken --min-top1 0.9 0.952 kept" in quality


def test_drawing_again_changes_nothing(folder: WorkFolder) -> None:
    run_report(folder.path)
    first = folder.page.read_bytes(), folder.report.read_bytes(), folder.stages.read_bytes()
    run_report(folder.path)
    assert (folder.page.read_bytes(), folder.report.read_bytes(), folder.stages.read_bytes()) == first
    settings = json.loads(folder.stages.read_text())["validate"]["settings"]
    assert StageCache(folder).is_current(StageState("validate", settings, (folder.report,))), (
        "it would be validated again"
    )


def test_pictures_are_found_from_anywhere(
    folder: WorkFolder, drawn: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    StageCache(folder).record(StageState("validate", {"held-out data": "held-out"}, (folder.report,)), 1.0)
    monkeypatch.chdir("/")
    assert folder.path.is_absolute()
    assert run_report(folder.path).read_text().count("data:image/webp") == 4
    (folder.path / "held-out" / "images" / "2.png").unlink()
    page = page_of(folder)
    assert page.text("answers").count("was not found; --samples names its folder") == 4
    assert run_report(folder.path, drawn.path / "held-out").read_text().count("data:image/webp") == 4


def test_pictures_from_elsewhere_are_shown_if_they_are_asked_for(folder: WorkFolder, tmp_path: Path) -> None:
    """A stranger's work folder names no private picture."""
    images = folder.path / "held-out" / "images"
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    held_out = folder.path / "held-out"
    assert "data:image/webp" not in run_report(folder.path, held_out).read_text()
    assert run_report(folder.path, held_out, outside=True).read_text().count("data:image/webp") == 4


def test_a_report_that_somebody_edited_stays_edited(folder: WorkFolder) -> None:
    settings = json.loads(folder.stages.read_text())["validate"]["settings"]
    folder.report.write_text(folder.report.read_text().replace("llama.cpp b1", "llama.cpp b2"))
    run_report(folder.path)
    assert not StageCache(folder).is_current(StageState("validate", settings, (folder.report,)))


def test_types_per_expert_are_shown_as_shares(grouped: WorkFolder, copied: Copied) -> None:
    folder = copied(grouped)
    page, plan = page_of(folder), Plan.load(folder.plan)
    assert plan.has_expert_groups
    types = plan.experts["blk.0.ffn_up_exps.weight"]
    shares = ", ".join(
        f"{one.name} {types.count(one)}" for one in sorted(set(types), key=lambda one: one.bits_per_weight)
    )
    assert shares in page.text("types")
    record = conversion_record(folder)
    assert record.prediction is not None
    assert record.prediction.this is not None
    assert plan.solver is not None
    assert sum(record.prediction.this) == pytest.approx(plan.solver.objective)


@pytest.mark.parametrize(
    ("removed", "sections"),
    [
        ("plan.json", ("size", "frontier", "types", "sensitivity")),
        ("calibration.safetensors", ("frontier", "routing", "coverage", "sensitivity")),
        ("sensitivity.safetensors", ("frontier", "sensitivity")),
        ("stages.json", ("timings", "command")),
    ],
)
def test_a_missing_artefact_is_named(folder: WorkFolder, removed: str, sections: tuple[str, ...]) -> None:
    (folder.path / removed).unlink()
    page = page_of(folder)
    assert page.faults == []
    assert {section for section in SECTIONS if f"Not shown: {removed} is not there" in page.text(section)} >= set(
        sections
    )
    shown = set(SECTIONS) - set(sections) - {"quality", "answers", "timings", "command"}
    assert not any("Not shown" in page.text(section) for section in shown)


def test_without_a_report_nothing_is_measured(folder: WorkFolder) -> None:
    folder.report.unlink()
    page = page_of(folder)
    assert page.faults == []
    assert "Not measured: there is no report.json of this file" in page.text("quality")
    assert "Predicted KL: text" in page.text("quality")
    assert "Not shown" in page.text("answers")
    assert "this file, measured" not in page.text("frontier")
    assert "95.2" not in page.text("")
    assert not folder.report.exists()


def test_a_report_of_another_file_is_not_shown(folder: WorkFolder) -> None:
    plan = Plan.load(folder.plan)
    report(plan, bpw=plan.bpw + 0.5).save(folder.report)
    before = folder.report.read_bytes()
    page = page_of(folder)
    assert "report.json is about another file, drawn.gguf" in page.text("warnings")
    assert "Not measured" in page.text("quality")
    assert folder.report.read_bytes() == before


def test_damaged_artefacts_are_named(folder: WorkFolder) -> None:
    folder.sensitivity.write_bytes(b"nothing")
    folder.stages.write_text('{"plan": 3, "calibrate": {"settings": {}, "outputs": {}, "seconds": "soon"}}')
    page = page_of(folder)
    assert page.faults == []
    assert "sensitivity.safetensors: cannot be read as a safetensors artefact" in page.text("frontier")
    assert "calibrate" in page.text("timings")
    folder.report.write_text("{}")
    with pytest.raises(InputError, match=r"report\.json"):
        run_report(folder.path)


def test_everything_from_files_is_escaped(drawn: WorkFolder) -> None:
    record = conversion_record(drawn)
    found = ValidationReport.load(drawn.report)
    text = record.model_dump_json()
    for plain in ("drawn", "Drawn-VL-MoE", "calibrate", "--bpw 3.4"):
        text = text.replace(f'"{plain}"', json.dumps(EVIL))
    evil = ConversionRecord.model_validate_json(text)
    evil = evil.model_copy(update={"stages": [run.model_copy(update={"command": EVIL}) for run in evil.stages]})
    evil = evil.model_copy(update={"versions": {EVIL: EVIL}})
    answers = [
        one.model_copy(update=dict.fromkeys(("question", "answer", "expected", "image"), EVIL)) for one in found.answers
    ]
    report = found.model_copy(
        update={"warnings": (EVIL,), "answers": answers, "runtime": EVIL, "held_out": EVIL, "seconds": {EVIL: 1.0}}
    )
    source = render_page(evil, report, {})
    page = Page(source)
    assert page.faults == []
    assert "<script" not in source
    assert source.count("&lt;script&gt;") > 20
    assert all(found.get("src") != "x" for _, found in page.tags)
    unknown = render_page(evil.model_copy(update={"plan": None, "missing": {"plan": EVIL}}), report, {})
    assert "<script" not in unknown
    assert Page(unknown).faults == []


def test_folders_without_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        work_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no plan\.json"):
        run_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_heatmaps_stay_small() -> None:
    random = np.random.default_rng(0)
    assert len(heatmap(random.random((48, 128)).tolist())) < 12_000
    assert heatmap([[0.0, float("nan")]]) != heatmap([[0.0, 0.0]])


def test_examples_take_turns_and_show_what_changed() -> None:
    answer = Answer(image="a", kind="sign", question="?", expected="1", answer="1", right=True, reference_answer="1")
    many = [
        answer.model_copy(update={"kind": kind, "image": str(n)}) for n, kind in enumerate(["sign"] * 6 + ["chart"] * 3)
    ]
    many[5] = many[5].model_copy(update={"answer": "2"})
    assert [one.image for one in examples(many, 4)] == ["0", "1", "5", "6"]
    assert examples([], 4) == []
    assert len(examples(many[:1], 4)) == 1
    changed = [one.model_copy(update={"answer": "2"}) for one in many]
    assert len(examples(changed, 4)) == 4


def test_numbers_in_words() -> None:
    assert [nats(value) for value in (None, 0.0, 0.012345, 12.345, 1234.5, 1.2e-9)] == [
        "\N{EN DASH}", "0", "0.0123", "12.3", "1234", "1.2e-09",
    ]  # fmt: skip
    assert [duration(value) for value in (0.04, 12, 89.4, 200, 7500)] == [
        "0.0 s",
        "12 s",
        "89 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert [size(value) for value in (950, 6.7e6, 12.34e9)] == ["1 kB", "6.7 MB", "12.3 GB"]
