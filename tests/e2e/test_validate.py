"""mode-gguf validate as a shell runs it: limits and exit codes, kept reference data, one JSON document."""

import json
from pathlib import Path

import pytest

from mode_gguf.validation.reference import RECORD
from tests.e2e.conftest import Ended, Run
from tests.validation.conftest import Files


@pytest.fixture
def command(small: Files, full: Files, held_out_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *("validate", str(small.text), "--reference", str(full.text), "--mmproj", str(full.mmproj)),
        *("--samples", str(held_out_folder), "--report", str(tmp_path / "report.json"), "--threads", "1"),
        *("--context", "1024", "--text-tokens", "32", "--answer-tokens", "8"),
    ]


def test_limits_that_are_kept(run: Run, command: list[str], tmp_path: Path) -> None:
    said = run(*command, "--max-kl", "1000", "--min-accuracy", "0", "--max-image-kl-p99-9", "1000")
    assert "limit     --max-kl 1000: " in said
    assert "kept" in said
    assert (tmp_path / "reference" / RECORD).is_file()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [check["kept"] for check in report["checks"]] == [True, True, True]
    assert report["scored_answers"] == "reference"
    assert report["settings"]["max_text_tokens"] == 32


def test_limits_that_are_broken(command: list[str], tmp_path: Path, ended: Ended) -> None:
    """The document is complete, the report is written, one line says what is broken, and the exit code is 5."""
    said, errors = ended(*command, "--json", "--max-image-kl", "1e-9", "--max-kl", "1000", code=5)
    assert "breaks --max-image-kl 1e-09: " in errors[0]
    assert "--max-kl" not in errors[0]
    document = json.loads(said)
    assert [check["kept"] for check in document["checks"]] == [True, False]
    assert document == json.loads((tmp_path / "report.json").read_text())


def test_reference_data_alone(run: Run, command: list[str], full: Files, tmp_path: Path) -> None:
    first = json.loads(run(*command, "--json"))
    place = command.index(str(full.text))
    command[place] = str(tmp_path / "reference")
    again = json.loads(run(*command, "--json", "--override-tensor", "exps=CPU"))
    assert again["text"] == first["text"]
    assert again["image"] == first["image"]
    assert again["reference"]["name"] == "pico-F32.gguf"


def test_pictures_outside_the_held_out_folder(
    run: Run, command: list[str], held_out_folder: Path, tmp_path: Path
) -> None:
    """A stranger's set puts no picture into the report but its own, unless it is allowed to."""
    folder = tmp_path / "strange"
    folder.mkdir()
    question = {"image": str(held_out_folder / "images" / "0.png"), "question": "What colour?"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    command[command.index(str(held_out_folder))] = str(folder)
    page = tmp_path / "report.html"
    assert "lies outside" in run(*command, code=4)
    assert not page.exists()
    run(*command, "--allow-outside-samples")
    assert "data:image/webp" in page.read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tensor-split", "a,b"], 2, "--tensor-split: numbers such as 3,1 expected; found 'a,b'"),
        (["--tensor-split", "0,0"], 2, "--tensor-split: shares of 0 or more expected, not all 0"),
        (["--override-tensor", "exps"], 2, "--override-tensor: REGEX=BUFFER expected"),
        (["--override-tensor", "exps=VRAM"], 2, "--override-tensor: VRAM is none of"),
        (["--device", "CUDA9"], 2, "--device: CUDA9 is none of"),
        (["--library", "nowhere"], 4, "nowhere: holds no libmtmd"),
        (["--reference", "http://127.0.0.1:9"], 4, "no llama-server answers there"),
        (["--reference", "."], 4, "cannot be read as a stored reference"),
        (["--samples", "nothing.jsonl"], 4, "nothing.jsonl: no such file or folder"),
    ],
)
def test_bad_options(run: Run, command: list[str], options: list[str], code: int, message: str, tmp_path: Path) -> None:
    assert message in run(*command, *options, code=code)
    assert not (tmp_path / "report.json").exists()


def test_a_limit_without_a_reference(run: Run, small: Files, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    said = run("validate", small.text, "--report", report, "--max-kl", "1", code=2)
    assert "--max-kl: needs a --reference to compare with" in said
    assert not report.exists()
