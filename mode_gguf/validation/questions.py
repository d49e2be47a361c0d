"""Held-out texts and questions about images, and when an answer counts as right."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.in_process import open_image
from mode_gguf.sample_files import read_rows

MATCHES: Final = ("exact", "contains", "number")
MOST_CHARACTERS: Final = 1 << 18
"""Limit of a question and of an answer: more fits no context."""
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image.

    Attributes:
        image: a picture's file.
        answer: the right answer; None asks only how far the candidate is from the reference.
        match: `exact`, `contains` or `number`, see `is_right`.
        kind: what accuracy is grouped by.
        origin: file and line, for messages.
    """

    image: Path
    question: str
    answer: str | None
    match: str
    kind: str
    origin: str


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """A held-out set: texts and questions that a file is judged on; `name` goes into the report."""

    name: str
    texts: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def samples(self) -> tuple[str | Question, ...]:
        """The texts, then the questions."""
        return (*self.texts, *self.questions)


def load_held_out(path: Path, *, outside: bool = False) -> HeldOutSet:
    """Read a folder's `text.jsonl` ({"text"}) and `questions.jsonl` ({"image", "question", "answer", "match", "kind"}).

    Either file may be absent, not both; one JSONL file with lines of both kinds does as well. Images are named relative
    to the folder; `match` is `exact` and `kind` is `question` unless given; other keys are ignored.

    What a stranger's set names outside its folder, by an absolute path, `..` or a symbolic link, would be shown in the
    report, which may be published: it is refused.

    Args:
        outside: whether that is read all the same.

    Raises:
        InputError: naming file and line: not JSON, a missing or wrong key, an image that cannot be read or lies
            outside.
    """
    if path.exists() and not path.is_dir():
        return _load_file(path, outside=outside)
    folder = path
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such file or folder; a folder should hold text.jsonl, questions.jsonl and images/, a JSONL "
            "file texts or questions"
        )
    files = [folder / name for name in ("text.jsonl", "questions.jsonl")]
    for file in files if not outside else ():
        _refuse_outside(file, folder, str(folder))
    texts = tuple(_text(row, origin) for row, origin in _rows(files[0]))
    questions = tuple(_question(row, origin, folder, outside=outside) for row, origin in _rows(files[1]))
    if not texts and not questions:
        raise InputError(f"{folder}: holds neither text.jsonl nor questions.jsonl with any line")
    return HeldOutSet(folder.resolve().name, texts, questions)


def is_right(answer: str, expected: str, match: str) -> bool:
    """Whether `answer` counts as right.

    Letter case, outer punctuation and runs of white space never matter. `exact`: the same text. `contains`: `expected`
    occurs in it as whole words. `number`: the first number in it has the value of `expected`.
    """
    if match == "number":
        return _first_number(answer) == _first_number(expected)
    given, wanted = _normalised(answer), _normalised(expected)
    if match == "exact":
        return given == wanted
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", given) is not None


def _load_file(path: Path, *, outside: bool) -> HeldOutSet:
    texts: list[str] = []
    questions: list[Question] = []
    for row, origin in read_rows(path):
        if "text" in row:
            texts.append(_text(row, origin))
        else:
            questions.append(_question(row, origin, path.parent, outside=outside))
    if not texts and not questions:
        raise InputError(f"{path}: holds no line")
    return HeldOutSet(path.stem, tuple(texts), tuple(questions))


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    return read_rows(path) if path.exists() else iter(())


def _text(row: dict[str, Any], origin: str) -> str:
    return _string(row, "text", origin)


def _question(row: dict[str, Any], origin: str, folder: Path, *, outside: bool) -> Question:
    match = _string(row, "match", origin, default="exact")
    answer = None if row.get("answer") is None else _string(row, "answer", origin)
    if match not in MATCHES:
        raise InputError(f"{origin}: match is {match!r}, expected one of {', '.join(MATCHES)}")
    if match == "number" and answer is not None and _first_number(answer) is None:
        raise InputError(f"{origin}: match is number, and the answer {answer!r} holds none")
    image = folder / _string(row, "image", origin)
    if not outside:
        _refuse_outside(image, folder, origin)
    try:
        open_image(image)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
    question = _string(row, "question", origin)
    for name, text in (("question", question), ("answer", answer or "")):
        if len(text) > MOST_CHARACTERS:
            raise InputError(f"{origin}: {name!r} has {len(text):,} characters, {MOST_CHARACTERS:,} at most expected")
    return Question(image, question, answer, match, _string(row, "kind", origin, default="question"), origin)


def _refuse_outside(file: Path, folder: Path, origin: str) -> None:
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, characters that no name has
        inside = False
    if not inside:
        raise InputError(
            f"{origin}: {file} lies outside {folder}, and the report would show it; copy it there, or if you know what "
            "it is, give --allow-outside-samples (to convert: --set validation.allow_outside_samples=true)"
        )


def _string(row: dict[str, Any], key: str, origin: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{origin}: {key!r} must be a text that is not empty, {value!r} found")
    return value


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")


def _first_number(text: str) -> float | None:
    found = _NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else None
