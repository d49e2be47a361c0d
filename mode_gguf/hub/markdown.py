"""Markdown of texts that come from others: what they say is shown, and nothing of it is markup."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import quote

from mode_gguf.plain_text import one_line, printable

_MARKUP: Final = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that begin or end markup; not an underscore within a word."""
_PIPE: Final = re.compile(r"(?<!\\)\|")
_WEB: Final = re.compile(r"https?://[\w.-]+(:\d+)?([/?#][^\s<>\"'`\\|()\[\]{}^]*)?", re.ASCII)
_RELATIVE: Final = re.compile(r"[\w.-][\w.\-/ ~+@,=]*(#[\w.-]*)?")


def text(value: object) -> str:
    """`value` as plain text of one line."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(one_line(str(value)), quote=False))


def code(value: object) -> str:
    """`value` as a code span."""
    line = one_line(str(value))
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(*lines: str) -> str:
    """Lines as a block of code."""
    shown = [printable(line, kept="\t") for line in lines]
    fence = "`" * max(3, _longest_run("\n".join(shown)) + 1)
    return "\n".join([fence, *shown, fence])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    cells = ([_PIPE.sub(r"\\|", cell) for cell in row] for row in (head, ["---"] * len(head), *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def web_link(address: str, below: str | None = None) -> str | None:
    """`address` if it leads to the web, or to a file in the repository that it is written in; else None.

    Args:
        below: the web address that such a file lies below, which is then put before it.
    """
    if _WEB.fullmatch(address):
        return address
    if not _RELATIVE.fullmatch(address) or ".." in address.split("/"):
        return None
    return address if below is None else f"{below}/{quote(address, safe='/#')}"


def _longest_run(line: str) -> int:
    return max(map(len, re.findall("`+", line)), default=0)
