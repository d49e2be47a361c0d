"""Files of a work folder as they are published: regular ones that lie in it, never what a link leads to."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from mode_gguf.errors import InputError

_FLAGS: Final = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
"""A link is not followed, and opening a pipe does not wait."""


def check_own(path: Path, folder: Path) -> None:
    """Make sure that `path`, if anything is there, is a regular file that lies in `folder` itself.

    Raises:
        InputError: it is a link, something else than a file, or elsewhere.
    """
    if path.parent != folder or path.name in ("", ".", ".."):
        raise InputError(f"{path}: lies outside of the work folder {folder}; only what is in it is published")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be looked at ({error})") from error
    _check_regular(path, mode)


@contextmanager
def opened_own(path: Path) -> Iterator[BinaryIO]:
    """`path` opened for reading.

    Raises:
        InputError: it is a link or no regular file, or cannot be read.
    """
    try:
        _check_regular(path, path.lstat().st_mode)
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    with os.fdopen(descriptor, "rb") as file:
        _check_regular(path, os.fstat(descriptor).st_mode)
        yield file


def read_own(path: Path) -> str:
    """Text of a file; raises as `opened_own`, and where it is not UTF-8."""
    try:
        with opened_own(path) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 ({error})") from error


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise InputError(
            f"{path}: is a link, and what it leads to is not published; put the file itself there, or remove the link"
        )
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is no regular file; move it away")
