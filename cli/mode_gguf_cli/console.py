"""What the command line says: results on stdout, everything else on stderr; bars on a terminal, lines elsewhere."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from mode_gguf.progress import Advance, Progress

stdout = Console()
stderr = Console(stderr=True)


def log_to_stderr() -> None:
    """Send the library's log records to stderr; warnings of the libraries below it only when they are warnings."""
    handler = RichHandler(console=stderr, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("mode_gguf").setLevel(logging.INFO)
    logging.getLogger("mode_gguf.llama_cpp").setLevel(logging.WARNING)  # it remarks on every model it loads


def progress() -> Progress:
    """Bars where somebody watches, one line per step and quarter where the output goes to a file."""
    return _Bars() if stderr.is_terminal else _Lines()


def show(line: str) -> None:
    """A line of a command's result, never wrapped or coloured, so that paths can be copied and piped."""
    stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """A remark for people."""
    stderr.print(message, highlight=False, soft_wrap=not stderr.is_terminal)


def emit_json(value: Mapping[str, Any]) -> None:
    """The one JSON document a command with `--json` puts on stdout."""
    print(json.dumps(value, indent=2))


class _Bars:
    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=stderr) as bars:
            task = bars.add_task(description, total=total)
            yield lambda n: bars.advance(task, n)


class _Lines:
    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Advance]:
        started, done, quarters = time.monotonic(), 0, 0

        def advance(n: int) -> None:
            nonlocal done, quarters
            done += n
            if 4 * done // max(total, 1) > quarters and done < total:
                quarters = 4 * done // total
                stderr.print(f"{description}: {done} of {total}", highlight=False, soft_wrap=True)

        yield advance
        seconds = time.monotonic() - started
        stderr.print(f"{description}: done, {total} in {seconds:.1f} s", highlight=False, soft_wrap=True)
