"""Held-out folders, and when an answer is right."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.in_process import open_image
from mode_gguf.validation.default_held_out import default_held_out
from mode_gguf.validation.questions import MATCHES, is_right, load_held_out
from mode_gguf.validation.report import Accuracy


@pytest.mark.parametrize(
    ("answer", "expected", "match", "right"),
    [
        (" Red.\n", "red", "exact", True),
        ("It is red", "red", "exact", False),
        ("It is  dark red!", "Dark red", "contains", True),
        ("It is redder", "red", "contains", False),
        ("a cat", "c.t", "contains", False),
        ("There are 3 of 5", "3", "number", True),
        ("There are 5 of 3", "3", "number", False),
        ("1,250.0 g", "1250", "number", True),
        ("-2", "2", "number", False),
        ("none", "0", "number", False),
        ("", "red", "contains", False),
    ],
)
def test_is_right(answer: str, expected: str, match: str, right: bool) -> None:
    assert is_right(answer, expected, match) is right


def test_wilson_interval_by_the_book() -> None:
    interval = Accuracy.of(8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(asked=st.integers(1, 500), data=st.data())
def test_wilson_interval_holds_the_share(asked: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, asked))
    interval = Accuracy.of(right, asked)
    assert 0 <= interval.low <= interval.share <= interval.high <= 1


def test_folder(held_out_folder: Path) -> None:
    held_out = load_held_out(held_out_folder)
    assert held_out.name == "pictures"
    assert len(held_out.texts) == 2
    count, colour, describe = held_out.questions
    assert (count.match, count.kind, count.answer) == ("number", "count", "3 shapes")
    assert (colour.match, colour.kind) == ("exact", "colour")
    assert describe.answer is None
    assert describe.origin.endswith("questions.jsonl:3")


def test_either_file_is_enough(held_out_folder: Path, tmp_path: Path) -> None:
    shutil.copy(held_out_folder / "text.jsonl", tmp_path)
    assert load_held_out(tmp_path).questions == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"questions\.jsonl:2: not valid JSON"),
        ("[1]", r"questions\.jsonl:2: a JSON object was expected, list found"),
        ({"question": "What?"}, r"questions\.jsonl:2: 'image' must be a text"),
        ({"image": "images/0.png"}, r"questions\.jsonl:2: 'question' must be a text"),
        ({"image": "images/9.png", "question": "?"}, r"questions\.jsonl:2: .*9\.png: cannot be read as an image"),
        ({"image": "images/0.png", "question": "?", "answer": 3}, r"questions\.jsonl:2: 'answer' must be a text"),
        ({"image": "images/0.png", "question": "?", "match": "fuzzy"}, r"questions\.jsonl:2: match is 'fuzzy'"),
        (
            {"image": "images/0.png", "question": "?", "match": "number", "answer": "two"},
            r"questions\.jsonl:2: match is number",
        ),
    ],
)
def test_bad_lines(held_out_folder: Path, tmp_path: Path, line: str | dict[str, object], message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(held_out_folder, folder)
    text = line if isinstance(line, str) else json.dumps(line)
    (folder / "questions.jsonl").write_text(f"\n{text}\n")
    with pytest.raises(InputError, match=message):
        load_held_out(folder)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_held_out(tmp_path / "absent")
    with pytest.raises(InputError, match="neither"):
        load_held_out(tmp_path)
    (tmp_path / "text.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load_held_out(tmp_path)


def test_built_in_set() -> None:
    held_out = default_held_out()
    assert all(len(text) > 80 for text in held_out.texts)
    for question in held_out.questions:
        open_image(question.image)
        assert question.match in MATCHES
    assert any(question.answer is None for question in held_out.questions)


def test_one_file_of_both_kinds(held_out_folder: Path) -> None:
    """Pictures are named relative to the file's folder."""
    lines = [(held_out_folder / name).read_text() for name in ("text.jsonl", "questions.jsonl")]
    path = held_out_folder / "both.jsonl"
    path.write_text("".join(lines))
    folder, file = load_held_out(held_out_folder), load_held_out(path)
    path.unlink()
    assert file.name == "both"
    assert file.texts == folder.texts
    assert [question.image for question in file.questions] == [question.image for question in folder.questions]
    assert [question.answer for question in file.questions] == [question.answer for question in folder.questions]


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"none\.jsonl: holds no line"):
        load_held_out(tmp_path / "none.jsonl")


def test_long_questions(held_out_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(held_out_folder, folder)
    row = {"image": "images/0.png", "question": "What? " * 100_000}
    (folder / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"questions\.jsonl:1: 'question' has 600,000 characters"):
        load_held_out(folder)


@pytest.mark.parametrize("name", ["text.jsonl", "questions.jsonl"])
def test_arrays_do_as_well_as_lines(held_out_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(held_out_folder, folder)
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text(json.dumps(rows, indent=1))
    before, after = load_held_out(held_out_folder), load_held_out(folder)
    assert after.texts == before.texts
    assert [one.question for one in after.questions] == [one.question for one in before.questions]


def test_files_in_the_folder_by_links_and_dots(held_out_folder: Path, tmp_path: Path) -> None:
    """What stays in the folder is no harm, however it is named; nor is a folder that is a link itself."""
    folder = tmp_path / "copy"
    shutil.copytree(held_out_folder, folder)
    (folder / "link.png").symlink_to("images/0.png")
    rows = [{"image": name, "question": "?"} for name in ("link.png", "images/../images/0.png", f"{folder}/link.png")]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "linked").symlink_to(folder)
    for one in (folder, tmp_path / "linked"):
        assert len(load_held_out(one).questions) == 3


@pytest.mark.parametrize("name", ["loop.png", "a\0b", "/dev/zero", "/proc/self/environ", "../copy2/x.png"])
def test_hostile_names(held_out_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(held_out_folder, folder)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "questions.jsonl").write_text(json.dumps({"image": name, "question": "?"}))
    with pytest.raises(InputError, match=r"questions\.jsonl:1: .*lies outside"):
        load_held_out(folder)
    with pytest.raises(InputError, match=r"questions\.jsonl:1: "):
        load_held_out(folder, outside=True)
