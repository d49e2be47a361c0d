"""Temporary folders that are locked while they are in use, so that those of killed processes are found and removed."""

import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import Final, Literal

from mode_gguf.locks import try_lock

_PREFIXES: Final = ("mode-gguf-hidden-", "mode-gguf-reference-", "mode-gguf-outline-")
_UNLOCKED: Final = ".mode-gguf-new-"


class LockedFolder:
    """A folder in TMPDIR for hidden states, or what else `kind` says; removed when it is closed or left, collected, or
    at the end of the process.

    It gets the name that `remove_abandoned` looks for once it is locked: so a folder of that name that nobody has
    locked is one whose process is gone, however short ago.
    """

    def __init__(self, kind: Literal["hidden", "reference", "outline"] = "hidden") -> None:
        made = Path(tempfile.mkdtemp(prefix=_UNLOCKED))
        lock = _locked(made)
        self.path = made.rename(made.with_name(f"mode-gguf-{kind}-" + made.name.removeprefix(_UNLOCKED)))
        self.close = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def remove_abandoned(*places: Path) -> None:
    """Remove the locked folders of processes that are gone, in TMPDIR and other places where they may have been made.

    Folders of other users stay, and so does whatever cannot be locked here.
    """
    for place in {Path(tempfile.gettempdir()), *places}:
        for folder in (found for prefix in _PREFIXES for found in place.glob(f"{prefix}*")):
            if _is_ours(folder) and (lock := _locked(folder)) is not None:
                _remove(folder, lock)


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder, not a link to one, of this user."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _locked(folder: Path) -> int | None:
    """The lock of a folder; None where another process has it, or folders cannot be locked."""
    try:
        return try_lock(folder)
    except OSError:
        return None  # Windows; a file system without locks; another user's
