"""An edited plan.json: what follows from its types is computed from them, and nothing in it leaves the work folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.gguf.header import read_header
from tests.e2e.conftest import QUICK, Run

BPW = ("--bpw", "3.6")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edited") / "work"


@pytest.fixture
def work(converted: Path, pico: Path, tmp_path: Path, run: Run) -> Path:
    """A copy of a converted work folder."""
    if not converted.exists():
        run("convert", pico, *BPW, "--out", converted, "--no-validate", *QUICK)
    return Path(shutil.copytree(converted, tmp_path / "work"))


def edit(work: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plan = json.loads((work / "plan.json").read_text())
    change(plan)
    (work / "plan.json").write_text(json.dumps(plan))


def larger_experts(plan: dict[str, Any]) -> None:
    for tensor in plan["tensors"]:
        if "_exps" in tensor["name"]:
            tensor["type"] = "Q6_K"


def with_sizes(plan: dict[str, Any]) -> None:
    """As a script would do it that knows the fields of tensors."""
    for tensor in plan["tensors"]:
        if "_exps" in tensor["name"]:
            tensor["type"], tensor["size_bytes"] = "Q6_K", tensor["n_weights"] // 256 * 210


def other_of_one_size(plan: dict[str, Any]) -> None:
    for tensor in plan["tensors"]:
        if tensor["type"] == "Q4_K":
            tensor["type"] = "IQ4_NL"


@pytest.mark.parametrize("change", [larger_experts, with_sizes])
def test_sizes_follow_from_the_types(work: Path, pico: Path, run: Run, change: Callable[..., None]) -> None:
    edit(work, change)
    result = json.loads(run("export", pico, "--out", work, "--json"))
    header = read_header(Path(result["model"]))
    assert result["bpw"] == pytest.approx(header.bpw, rel=1e-3)
    assert Path(result["model"]).name == f"{pico.name}-MODE-{result['bpw']:.2f}bpw-Q6_K_MODE.gguf"
    assert "=q6_K" in (work / "tensor-types.txt").read_text()
    run("report", work)
    page = (work / "report.html").read_text()
    assert f"bits per weight</dt><dd>{result['bpw']:.2f}" in page
    again = json.loads(run("convert", pico, *BPW, "--out", work, "--json", "--no-validate", *QUICK))
    assert (again["bpw"], again["model"]) == (result["bpw"], result["model"])
    assert again["seconds"]["plan"] == 0


def test_nothing_is_proven_of_other_types_of_one_size(work: Path, pico: Path, run: Run) -> None:
    before = json.loads(run("plan", pico, "--out", work, *BPW, "--preset", "paper", "--json"))
    assert before["gap"] is not None
    edit(work, other_of_one_size)
    now = json.loads(run("plan", pico, "--out", work, *BPW, "--preset", "paper", "--json"))
    assert now["bpw"] == before["bpw"]
    assert (now["gap"], now["predicted_cost"]) == (None, None)


def first_expert(plan: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(tensor for tensor in plan["tensors"] if "_exps" in tensor["name"])
    return found


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "main type": (lambda plan: plan.update(main_type="x/../../../ESCAPED"), "main_type is 'x/../../../ESCAPED'"),
    "weights": (lambda plan: first_expert(plan).update(n_weights=512), "the model has"),
    "part of a block": (lambda plan: first_expert(plan).update(n_weights=511), "do not divide 511 weights"),
    "no experts": (lambda plan: first_expert(plan).update(experts=[]), "has types of 0 experts"),
    "type beside experts": (
        lambda plan: first_expert(plan).update(type="Q6_K", experts=["Q4_K"] * 4),
        "edit `experts`",
    ),
    "unknown tensor": (lambda plan: first_expert(plan).update(name="blk.9.ffn_up_exps.weight"), "does not have"),
    "twice": (lambda plan: plan["tensors"].append(first_expert(plan)), "is named twice"),
    "left out": (lambda plan: plan["tensors"].pop(), "the plan has no type for"),
    "no tensors": (lambda plan: plan["tensors"].clear(), "the plan has no type for"),
    "budget": (lambda plan: plan["budget"].update(value=-1), "budget.value"),
    "no number": (lambda plan: plan["budget"].update(value=float("inf")), "budget.value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(work: Path, pico: Path, run: Run, name: str) -> None:
    change, words = REFUSED[name]
    before = {path.name for path in work.iterdir()}
    edit(work, change)
    assert words in run("export", pico, "--out", work, code=4)
    assert {path.name for path in work.iterdir()} == before
    assert not list(work.parent.parent.rglob("*ESCAPED*"))


@pytest.mark.parametrize("model", ["../../x", "a/b", "..", "a\nb", "n" * 300, "", "C:\\x"])
def test_the_models_name_stays_a_name(work: Path, pico: Path, run: Run, model: str) -> None:
    """Readers take it from the plan, and look for files by it."""
    edit(work, lambda plan: plan["made_from"].update(model=model))
    run("report", work)
    line = run("publish", "someone/x", work, "--unvalidated", code=4)
    assert "was changed after `export` had followed it" in line


@pytest.mark.parametrize("name", ["../outside.gguf", "/etc/passwd", "a/b.gguf", ".."])
def test_records_of_outputs_do_not_leave_the_folder(work: Path, run: Run, name: str) -> None:
    (work.parent / "outside.gguf").write_bytes(b"private")
    stages = json.loads((work / "stages.json").read_text())
    stages["export"]["outputs"] = {name: "7 bytes, 0"}
    (work / "stages.json").write_text(json.dumps(stages))
    assert "is no name of a file in this folder" in run("publish", "someone/x", work, "--unvalidated", code=4)
    stages["export"]["settings"]["imatrix"] = "../../x"
    stages["export"]["outputs"] = {}
    (work / "stages.json").write_text(json.dumps(stages))
    run("publish", "someone/x", work, "--unvalidated", code=4)


def test_a_model_may_be_called_anything(pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(pico, tmp_path / f"a\nb|c: {'ü' * 100}"))
    result = json.loads(run("convert", model, *BPW, "--json", "--no-validate", *QUICK))
    path = Path(result["model"])
    assert path.parent.name.startswith("a_b_c_ üüü")
    assert path.name.startswith("a_b_c_ üüü")
    assert path.parent.name.endswith("ü-mode-gguf")
    assert run("report", path.parent)
