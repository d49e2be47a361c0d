"""Console output: results on stdout, everything else on stderr; progress bars on a terminal, lines elsewhere."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from mode_gguf.plain_text import PrintableFormatter, printable
from mode_gguf.progress import Advance, Progress, silent

LONGEST_SILENCE = 60
"""Longest time between progress lines of a step, in seconds."""

stdout = Console()
stderr = Console(stderr=True)


def log_to_stderr() -> None:
    """Send the library's log records to stderr; warnings of the libraries below it only when they are warnings."""
    handler = RichHandler(console=stderr, show_time=False, show_path=False, markup=False)
    handler.setFormatter(PrintableFormatter("%(message)s", "\n\t"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("mode_gguf").setLevel(logging.INFO)
    logging.getLogger("mode_gguf.libllama").setLevel(logging.WARNING)  # it remarks on every model it loads


def be_quiet() -> None:
    """Silence stderr except for errors; results still go to stdout."""
    stderr.quiet = True
    logging.getLogger().setLevel(logging.ERROR)


def fail(message: str) -> None:
    """Print an error to stderr as one line, even with --quiet."""
    stderr.quiet = False
    text = Text.assemble(("error:", "bold red"), f" {printable(message.strip(), kept='')}")
    stderr.print(text, soft_wrap=not stderr.is_terminal)


def progress() -> Progress:
    """Progress output: bars on a terminal, one line per step and quarter where the output goes to a file."""
    if stderr.quiet:
        return silent
    return _Bars() if stderr.is_terminal else _Lines()


def show(line: str) -> None:
    """Print a line of a command's result, never wrapped or coloured, so that paths can be copied and piped."""
    stdout.print(printable(line), markup=False, emoji=False, highlight=False, soft_wrap=True)


def cell(text: str) -> Text:
    """A cell of a table: `text` as it is, which is no markup and cannot steer the terminal."""
    return Text(printable(text, kept=""))


def say(message: str) -> None:
    """Print a note to stderr."""
    stderr.print(printable(message), markup=False, emoji=False, highlight=False, soft_wrap=not stderr.is_terminal)


def emit_json(value: Mapping[str, Any]) -> None:
    """The one JSON document a command with `--json` puts on stdout."""
    print(json.dumps(value, indent=2))


class _Bars:
    @contextmanager
    def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[counted]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=stderr) as bars:
            state = StepProgress(total, unit, layers)
            task = bars.add_task(description, total=total, counted=state.counted())

            def advance(n: int) -> None:
                state.done += n
                bars.update(task, completed=state.done, counted=state.counted())

            yield advance


class _Lines:
    """A line every quarter, and every minute of long work."""

    @contextmanager
    def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> Iterator[Advance]:
        state, quarters, last = StepProgress(total, unit, layers), 0, time.monotonic()

        def advance(n: int) -> None:
            nonlocal quarters, last
            state.done += n
            now = time.monotonic()
            if (4 * state.done // max(total, 1) > quarters or now - last >= LONGEST_SILENCE) and state.done < total:
                quarters, last = 4 * state.done // total, now
                stderr.print(f"{description}: {state.counted()}{state.remaining()}", highlight=False, soft_wrap=True)

        yield advance
        stderr.print(f"{description}: done, {state.result()}", highlight=False, soft_wrap=True)


@dataclass(slots=True)
class StepProgress:
    """Progress of a step, as text; see `Progress.step`."""

    total: int
    unit: str
    layers: int
    done: int = 0
    started: float = field(default_factory=lambda: time.monotonic())

    def counted(self) -> str:
        """Items done of all, and the speed."""
        if self.layers > 1:
            counts = f"{self.done * self.layers // max(self.total, 1)} of {self.layers} layers"
        elif self.unit:
            counts = f"{_amount(self.done)} of {_amount(self.total)} {self.unit}"
        else:
            counts = f"{self.done} of {self.total}"
        return counts + self._speed()

    def remaining(self) -> str:
        """Time left at this speed; empty in the first seconds."""
        elapsed = self._elapsed()
        if self.done == 0 or elapsed < 5:
            return ""
        return f", {duration(elapsed * (self.total - self.done) / self.done)} left"

    def result(self) -> str:
        """Number of items, time and speed of the finished step."""
        counts = _amount(self.total // self.layers) if self.unit else str(self.total)
        named = f"{counts} {self.unit}" if self.unit else counts
        return (
            f"{named}{f' x {self.layers} layers' if self.layers > 1 else ''} in {self._elapsed():.1f} s{self._speed()}"
        )

    def _speed(self) -> str:
        if not self.unit or self.done == 0:
            return ""
        return f", {_amount(self.done / self.layers / max(self._elapsed(), 1e-6))} {self.unit}/s"

    def _elapsed(self) -> float:
        return time.monotonic() - self.started


def _amount(value: float) -> str:
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= divisor:
            return f"{value / (1e3 if letter == 'k' else divisor):.1f} {letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Text of a duration, in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
