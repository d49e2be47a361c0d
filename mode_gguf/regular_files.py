"""The check that what is about to be read is a file: a FIFO or a device may never end, and reading one may hang."""

import stat
from pathlib import Path
from typing import Final

from mode_gguf.errors import InputError

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, what: str = "file") -> None:
    """Refuse a path that leads to something else than a file; what is not there is for the reader to report.

    Args:
        what: what messages call what was expected.

    Raises:
        InputError: it is a folder, a named pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise InputError(f"{path}: {kind} found, a {what} expected; give a file on disk")
