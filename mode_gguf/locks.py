"""Locks on files and folders that end with the process that holds them, however it ends."""

import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def try_lock(path: Path, *, create: bool = False) -> int | None:
    """Lock `path`; the file descriptor that holds the lock, or None if another one does, in whatever process.

    The lock ends when the descriptor is closed or its process is gone, kill -9 included, so that none is ever stale.
    Where the system has no such locks, nothing is locked and the descriptor says nothing.

    Args:
        create: make the file if it is not there.

    Raises:
        OSError: `path` cannot be opened.
    """
    while True:
        descriptor = os.open(
            path, (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY) | getattr(os, "O_CLOEXEC", 0), 0o666
        )
        if sys.platform == "win32":
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # Its last holder may have removed it between our opening and locking it; then the lock keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)
        if not create:
            return None
