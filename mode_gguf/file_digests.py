"""Digests of files by their whole content, kept so that none is read twice while it stays as it is."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from mode_gguf.artifacts import write_text
from mode_gguf.errors import InputError
from mode_gguf.progress import Progress, silent

Stamp: TypeAlias = tuple[int, int, int, int]
"""Size, times of the last changes of content and of the entry, and inode: while they stay, so does the content."""

_SHOWN_BYTES: Final = 1 << 30
"""Bytes to read from which on progress is shown."""
_CHUNK: Final = 1 << 22
_READERS: Final = 4
_KNOWN: dict[tuple[str, Stamp], str] = {}
"""Digests that this process has computed or read."""


def digests_of(files: Sequence[Path], kept: Path | None = None, progress: Progress = silent) -> list[str]:
    """SHA-256 of each file, in hexadecimal digits.

    Args:
        kept: JSON file that keeps digests for the next process, written where its folder is there.

    Raises:
        InputError: a file cannot be read, or is being written.
    """
    try:
        named = {file: (str(file.absolute()), _stamp(file)) for file in files}
        if kept and not _KNOWN.keys() >= set(named.values()):
            _KNOWN.update(_read(kept))
        unknown = {file: stamp for file, (path, stamp) in named.items() if (path, stamp) not in _KNOWN}
        for file, digest in _digests(unknown, progress).items():
            _KNOWN[named[file]] = digest
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    found = [_KNOWN[named[file]] for file in files]
    if unknown and kept and kept.parent.is_dir():
        _write(kept, {named[file]: digest for file, digest in zip(files, found, strict=True)})
    return found


def _digests(files: Mapping[Path, Stamp], progress: Progress) -> dict[Path, str]:
    """Digests of files that have these stamps."""
    size = sum(stamp[0] for stamp in files.values())
    shown = progress if size >= _SHOWN_BYTES else silent
    with shown.step("identifying files", size, "bytes") as advance, ThreadPoolExecutor(_READERS) as pool:
        found = {}
        for file, digest in zip(files, pool.map(_digest, files, files.values()), strict=True):
            found[file] = digest
            advance(files[file][0])
        return found


def _digest(file: Path, stamp: Stamp) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    if _stamp(file) != stamp:
        raise InputError(f"{file}: changes while it is read; wait until it is written")
    return digest.hexdigest()


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _read(kept: Path) -> dict[tuple[str, Stamp], str]:
    """Digests that an earlier process kept; none where the file is not there or cannot be trusted."""
    found: dict[tuple[str, Stamp], str] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        for path, (stamp, digest) in json.loads(kept.read_text(encoding="utf-8")).items():
            size, changed, entered, inode = map(int, stamp)
            found[path, (size, changed, entered, inode)] = str(digest)
    return found


def _write(kept: Path, digests: Mapping[tuple[str, Stamp], str]) -> None:
    """Keep digests beside those that are kept already, of files that are still there."""
    stored = {path: (stamp, digest) for (path, stamp), digest in {**_read(kept), **digests}.items()}
    write_text(kept, json.dumps({path: one for path, one in stored.items() if Path(path).exists()}, indent=1) + "\n")
