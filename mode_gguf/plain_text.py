"""Text that strangers wrote, made fit for a terminal, a log, a shell and a file name."""

import logging
import re
import shlex
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Final

NAME_BYTES: Final = 120
"""Longest name of a model in file names: with what is put around it, a file name has 255 bytes at most."""
_UNNAMED: Final = "model"
_OTHER_FILES: Final = re.compile("(?<=mm)(?=proj)|(?<=i)(?=matrix)|(?<=^mtp)-")
"""Within what names projectors, importance matrices and blocks for multi-token prediction."""
_IN_NAMES: Final = frozenset(" ._-+()@=~")
"""What names of files have besides letters, marks and digits: nothing that a hub's address, a shell's pattern, a table
or another system's disk takes for something else."""


def printable(text: str, kept: str = "\n\t") -> str:
    """`text` without what could steer a terminal; what is not `kept` is written as Python writes it (`\\x1b`)."""
    return "".join(char if char.isprintable() or char in kept else repr(char)[1:-1] for char in text)


class PrintableFormatter(logging.Formatter):
    """A formatter of log messages that are `printable`; tracebacks stay as they are."""

    def __init__(self, layout: str, kept: str = "\t") -> None:
        super().__init__(layout)
        self._kept = kept

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record), self._kept)


def one_line(text: str, length: int | None = None) -> str:
    """`text` as one line that cannot steer a terminal, cut to `length` characters."""
    line = " ".join(text.split())
    cut = line if length is None or len(line) <= length else f"{line[: length - 3]}..."
    return printable(cut, kept="")


def file_name_part(name: str) -> str:
    """`name` as a part of file names that every disk, the hub, a shell and llama.cpp take as it is.

    Ordinary names stay as they are. Runs of other characters become one `_`; dashes and dots are no beginning (an
    option, a hidden file), blanks and dots no end. What llama.cpp knows other files by is broken up.
    """
    kept = "".join(char if _is_kept(char) else "\0" for char in name)
    joined = "_".join(part for part in kept.split("\0") if part).lstrip(" .-")
    cut = _OTHER_FILES.sub("_", joined).encode()[:NAME_BYTES].decode(errors="ignore")
    return cut.rstrip(" .") or _UNNAMED


def _is_kept(char: str) -> bool:
    return char.isalnum() or char in _IN_NAMES or unicodedata.category(char).startswith("M")


def shell_line(words: Iterable[str | Path]) -> str:
    """A command as a shell reads it back, each of `words` quoted where it has to be; no path is taken for an option."""
    return " ".join(shell_word(word) for word in words)


def shell_word(word: str | Path) -> str:
    """One word of a command, quoted where it has to be; a path that begins with a dash begins with `./`."""
    text = str(word)
    return shlex.quote(f"./{text}" if isinstance(word, Path) and text.startswith("-") else text)
