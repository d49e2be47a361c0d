"""Working in a folder: alone, after tidying up what a killed run left, and with a log."""

import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mode_gguf import __version__
from mode_gguf.artifacts import remove_parts
from mode_gguf.errors import InputError, ModeGgufError
from mode_gguf.locks import try_lock
from mode_gguf.plain_text import PrintableFormatter
from mode_gguf.temporary_folders import remove_abandoned
from mode_gguf.workfolder import JOURNAL, WorkFolder

library, journal = logging.getLogger("mode_gguf"), logging.getLogger(JOURNAL)
journal.propagate = False
journal.addHandler(logging.NullHandler())


@contextmanager
def folder_lock(folder: WorkFolder) -> Iterator[None]:
    """Keep other processes out of the folder, which is made if needed, and log to its mode-gguf.log.

    A folder that was made for this and got nothing before an error is removed again.

    Raises:
        InputError: another process works in it.
    """
    made = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder)
    try:
        with _logged(folder):
            for place in (folder.path, folder.rounded, folder.reference):
                remove_parts(place)
            yield
    except BaseException:
        nothing = {folder.lock.name, folder.log.name, folder.digests.name}
        if made and {path.name for path in folder.path.iterdir()} <= nothing:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _lock(folder: WorkFolder) -> int:
    """Lock the folder and leave in the lock file who has it."""
    descriptor, before = try_lock(folder.lock, create=True), _temporary(folder.lock)
    if descriptor is None:
        raise InputError(
            f"{folder.path}: another mode-gguf works in this folder ({_owner(folder.lock)}); wait for it, or choose "
            "another folder with --out"
        )
    # Hidden states of a run that was killed take as much space as those of the run that goes on.
    remove_abandoned(*before)
    here = str(Path(tempfile.gettempdir()).absolute())
    owner = {"pid": os.getpid(), "command": shlex.join(sys.argv), "since": _now(), "temporary": here}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(owner) + "\n").encode())
    return descriptor


def _temporary(lock: Path) -> list[Path]:
    """The temporary folder of the last run here, which may have had another one."""
    try:
        return [Path(json.loads(lock.read_text(encoding="utf-8"))["temporary"])]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _owner(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {owner['pid']}, since {owner['since']}: {owner['command']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "its lock file does not say which process"


@contextmanager
def _logged(folder: WorkFolder) -> Iterator[None]:
    """Append to the folder's log: what is run, stages with their settings and times, warnings, and how it ends."""
    handler = _LogFile(folder.log, encoding="utf-8", delay=True)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    for logger in (library, journal):
        logger.addHandler(handler)
    level = journal.level
    journal.setLevel(logging.INFO)
    started = time.monotonic()
    journal.info("mode-gguf %s: %s", __version__, shlex.join(sys.argv))
    try:
        yield
        journal.info("finished in %.1f s", time.monotonic() - started)
    except ModeGgufError as error:
        journal.error("%s", error)
        raise
    except BaseException as error:
        journal.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, KeyboardInterrupt))
        raise
    finally:
        journal.setLevel(level)
        for logger in (library, journal):
            logger.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log that cannot be written, on a full disk, is no reason to stop or to print tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
