"""Files of samples: texts, and rows of JSON in the forms that data sets have, told apart by what is in them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

MAX_SAMPLE_BYTES: Final = 2**30
"""Size limit of a sample file in bytes; a few hundred samples are used."""
JSON_SUFFIXES: Final = (".json", ".jsonl", ".ndjson")
"""Endings of files that must hold JSON."""
OTHER_TABLES: Final = (".parquet", ".arrow", ".csv", ".tsv", ".tar", ".zip", ".gz", ".zst", ".feather", ".pkl")
"""Endings of files that hold samples in a form that is not read."""
AS_JSON_LINES: Final = (
    "write its rows as JSON lines (for one, pandas.read_parquet(FILE).to_json('samples.jsonl', orient='records', "
    "lines=True)), or name the data set on the hub"
)
_LISTS: Final = ("data", "rows", "samples", "examples", "train")
"""Keys under which one JSON object may hold the rows."""
_BEGIN: Final = re.compile(r"\s*(\[\s*)?\{\s*\"")
_ARRAY: Final = re.compile(r"\s*\[\s*[{\]]")
_KEYS: Final = frozenset(("text", "conversations", "messages", "image", "images", "question"))
_KEY_OF_SAMPLES: Final = re.compile(rf'"({"|".join(sorted(_KEYS))})"\s*:')
_HEAD: Final = 1 << 16


def read_sample_text(path: Path) -> str:
    """A file of samples as text, without a byte order mark.

    Raises:
        InputError: it is no regular file, is larger than `MAX_SAMPLE_BYTES`, or cannot be read as UTF-8.
    """
    check_regular(path, "file of samples")
    try:
        if (size := path.stat().st_size) > MAX_SAMPLE_BYTES:
            raise InputError(f"{path}: {size:,} bytes, {MAX_SAMPLE_BYTES:,} at most are read; use a part of it")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        kind = "JSON" if path.suffix.lower() in JSON_SUFFIXES else "text"
        raise InputError(f"{path}: cannot be read as UTF-8 {kind} ({error})") from error


def holds_rows(path: Path, text: str) -> bool:
    """Whether a file holds rows of JSON and not prose: its name says so, or it begins like samples in JSON."""
    if path.suffix.lower() in JSON_SUFFIXES:
        return True
    return _BEGIN.match(text, 0, _HEAD) is not None and _KEY_OF_SAMPLES.search(text, 0, _HEAD) is not None


def mentions_samples(text: str) -> bool:
    """Whether a JSON text has any key that rows of samples have."""
    return _KEY_OF_SAMPLES.search(text) is not None


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """`rows_of` a file; raises what that and `read_sample_text` do."""
    return rows_of(path, read_sample_text(path))


def rows_of(path: Path, text: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows in `text`, each with `file:line`, or `file[number]` in an array, for messages about it.

    JSON lines, of which empty ones are passed over; an array of objects; an object that holds one under `data` or its
    like; or one object, which is one row.

    Raises:
        InputError: it is not such JSON.
    """
    for row, origin in _values(path, text):
        if not isinstance(row, dict):
            raise InputError(f"{origin}: a JSON object was expected, {type(row).__name__} found")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{origin}: half of a character ({error.object[error.start]!r})") from error
        yield row, origin


def _values(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    used = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not used:
        return
    is_array = _ARRAY.match(text) is not None
    if len(used) > 1 and not is_array and _is_json(used[0][1]):
        yield from ((_parsed(line, path, number), f"{path}:{number}") for number, line in used)
        return
    document = _parsed(text.rstrip(), path)
    if isinstance(document, dict) and not document.keys() & _KEYS:
        rows = next((document[key] for key in _LISTS if isinstance(document.get(key), list)), None)
    else:
        rows = document if is_array else None
    if rows is None:
        yield document, f"{path}:{used[0][0]}"
    else:
        yield from ((row, f"{path}[{number}]") for number, row in enumerate(rows))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """The value that `text`, which begins in a file's line, holds in JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise InputError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers too long, too much inside each other
        raise InputError(f"{path}:{line}: not valid JSON ({error})") from error
