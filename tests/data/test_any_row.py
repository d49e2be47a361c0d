"""Rows of any shape, and files of any bytes: a sample, or one InputError that names them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mode_gguf.data.sharegpt import sample_of_row
from mode_gguf.errors import InputError
from mode_gguf.sample_files import holds_rows, read_sample_text, rows_of

KEYS = (
    *("text", "conversations", "messages", "image", "images", "video", "img", "from", "role", "value", "content"),
    *("type", "image_url", "url", "path", "bytes", "base64", "source", "data"),
)
WORDS = (
    *("", "<image>", "What?", "<image>\n<image 2>", "<video>", "human", "user", "gpt", "assistant", "system", "text"),
    *(
        "image",
        "image_url",
        "image.png",
        "data:image/png;base64,AAAA",
        "data:,",
        "file:///x",
        "http://[",
        "\0",
        "a" * 300,
    ),
)
NAMES = st.sampled_from(KEYS) | st.text(max_size=5)
ROLES = st.sampled_from(["user", "assistant", "system", "x"])
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(WORDS) | st.text(max_size=8)


def nested(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inside, max_size=4) | st.dictionaries(
        st.sampled_from(KEYS) | st.text(max_size=5), inside, max_size=4
    )


VALUES = st.recursive(LEAVES, nested, max_leaves=12)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": VALUES}),
    max_size=3,
)
ROWS = (
    st.dictionaries(NAMES, VALUES, max_size=4)
    | st.fixed_dictionaries({"messages": TURNS}, optional={"image": VALUES, "images": VALUES})
    | VALUES
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (8, 6)).save(folder / "image.png")
    return folder


@settings(max_examples=400, deadline=None)
@given(row=ROWS)
def test_any_row(folder: Path, row: Any) -> None:
    for where in (folder, None):
        try:
            sample = sample_of_row(row, "rows.jsonl:1", "tests", where)
        except InputError as error:
            assert str(error).startswith("rows.jsonl:1: ")  # noqa: PT017
            assert len(str(error)) < 1000  # noqa: PT017
        else:
            assert sample.text or any(message.role == "user" for message in sample.messages)
            assert sum(len(message.pictures) for message in sample.turns) == len(sample.images)
            for message in sample.turns:
                assert list(message.pictures) == sorted(message.pictures)
                assert all(0 <= place <= len(message.text) for place in message.pictures)


def as_rows(folder: Path, content: bytes, ending: str) -> None:
    path = folder / f"any{ending}"
    path.write_bytes(content)
    try:
        text = read_sample_text(path)
        if holds_rows(path, text):
            assert all(isinstance(row, dict) for row, _ in rows_of(path, text))
    except InputError as error:
        assert str(error).startswith(str(path))  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=40) | st.text(alphabet='[]{}":,\n text1', max_size=60).map(str.encode))
def test_any_file(folder: Path, content: bytes) -> None:
    for ending in (".json", ".jsonl", ".txt"):
        as_rows(folder, content, ending)


FORMS: tuple[Callable[[list[Any]], str], ...] = (
    json.dumps,
    lambda rows: json.dumps(rows, indent=1),
    lambda rows: "\n".join(map(json.dumps, rows)),
    lambda rows: json.dumps({"data": rows}),
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"text": st.text(max_size=9)}), min_size=2, max_size=4))
def test_all_forms_hold_the_same_rows(folder: Path, rows: list[Any]) -> None:
    for form in FORMS:
        path = folder / "same.json"
        path.write_text(form(rows), encoding="utf-8")
        assert [row for row, _ in rows_of(path, read_sample_text(path))] == rows
