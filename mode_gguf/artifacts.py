"""Artefacts of the stages: files that appear whole or not at all, with fingerprints of their inputs.

Every artefact carries a schema number of its own and the fingerprints of its inputs, so that a later stage can refuse a
file that belongs to another model, and `convert` can skip a stage whose inputs have not changed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as PydanticError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.regular_files import check_regular

SCHEMAS: Final[Mapping[str, int]] = {
    "calibration": 3,
    "probes": 1,
    "sensitivity": 2,
    "token-weights": 2,
    "unit-kl": 2,
    "plan": 1,
    "rounded": 2,
    "text model": 1,
    "projector": 1,
    "mtp": 1,
    "reference": 1,
    "report": 1,
}
"""The schema number of every artefact: raised with its form, and with the method that makes it. A higher number of one
artefact has its stage run again, and those that build on it; nothing else does, the tool's version included."""
_METADATA_KEY = "mode_gguf"
_PART = ".mode-gguf.part"

RecordT = TypeVar("RecordT", bound="Record")


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any error (Ctrl-C too) it is removed.

    It is on the disk before it gets its name: after a power cut some file systems have the new name of a file and not
    its contents. The rename itself may be lost then, which leaves the old file or none, and the work is done again. A
    process that is killed leaves the temporary file, see `remove_parts`.

    Raises:
        MissingResourceError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        # NumPy's `tofile` says how much it wrote, and not why no more.
        if error.errno not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise MissingResourceError(
            f"{path}: cannot be written, the disk is full ({error}); free some space, or choose another folder with "
            "--out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """`path` itself if it is there, or else the nearest folder above it that is."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on, or would be."""
    return shutil.disk_usage(existing_parent(path)).free


def remove_parts(folder: Path) -> None:
    """Remove what `replaced_atomically` left in a folder where a process was killed; none may be at work there."""
    for path in folder.glob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with replaced_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write arrays and JSON metadata to a safetensors file, atomically."""
    header = {_METADATA_KEY: json.dumps({"schema_version": schema_of(metadata), **metadata})}
    with replaced_atomically(path) as temporary:
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, header)
        except SafetensorError as error:  # of an operating system's error it keeps the text alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def read_metadata(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The JSON metadata of a file written by `write_arrays`, which must say that it is of `kind`, if given.

    Raises:
        InputError: the file is missing, is not safetensors, was written by another schema version, or is of another
            kind.
    """
    check_regular(path, "safetensors artefact")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as a safetensors artefact ({error})") from error
    try:
        metadata = json.loads(header.get(_METADATA_KEY, "{}"))
        if not isinstance(metadata, dict):
            raise ValueError(f"an object was expected, {type(metadata).__name__} found")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata {_METADATA_KEY} is not valid JSON ({error})") from error
    if metadata.get("schema_version") != schema_of(metadata):
        raise InputError(
            f"{path}: schema version {metadata.get('schema_version')} found, {schema_of(metadata)} expected; "
            "run the stage that writes it again"
        )
    if kind is not None and (found := metadata.get("kind")) != kind:
        raise InputError(f"{path}: a {kind} file was expected, found {found or 'another kind'}")
    return metadata


def schema_of(metadata: Mapping[str, Any]) -> int:
    """The schema number of an artefact of this kind, finished or not."""
    return SCHEMAS.get(str(metadata.get("kind", "")).removesuffix("-partial"), 1)


def read_arrays(
    path: Path, kind: str | None = None, *, without: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of a file written by `write_arrays`, whose metadata must say that it is of `kind`, if given.

    Arrays whose names end in `without` are not read.

    Raises:
        InputError: as `read_metadata`.
    """
    metadata = read_metadata(path, kind)
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if without is None or not name.endswith(without)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}, metadata


class Record(BaseModel):
    """Base of the JSON files that people may edit: unknown fields are refused, so that a slip of the pen is seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_record(path: Path, record: type[RecordT], what: str) -> RecordT:
    """Read `path` as a `record`; `what` is what messages call it.

    Raises:
        InputError: not there, not JSON, or a field that makes no sense; the message names it.
    """
    check_regular(path, what)
    try:
        return record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a {what} ({error})") from error
    except PydanticError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def fingerprint(*parts: Any) -> str:
    """A short stable digest of JSON-able values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """A digest of a file's whole content; meant for files that are small next to a model."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
