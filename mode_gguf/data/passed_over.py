"""Rows and files of calibration data that are passed over, counted by kind and said once."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from mode_gguf.data.promised_media import PromisedMediaError
from mode_gguf.sample_files import AS_JSON_LINES, OTHER_TABLES

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """What was passed over of one source.

    Attributes:
        rows: number of rows by what they promise.
        examples: where the first one of each kind is.
        files: number of files by ending.
    """

    rows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    files: Counter[str] = field(default_factory=Counter)

    def note_row(self, error: PromisedMediaError) -> None:
        """Count a row."""
        self.rows[error.kind] += 1
        self.examples.setdefault(error.kind, error.origin)

    def __str__(self) -> str:
        """All of it, in one line; empty where nothing was passed over."""
        said = []
        if self.rows:
            kinds = "; ".join(f"{count:,} with {kind} ({self.examples[kind]})" for kind, count in self.rows.items())
            said.append(f"rows about media that is not loaded are passed over: {kinds}")
        if self.files:
            kinds = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in self.files.items())
            said.append(f"files are passed over: {kinds}")
        if any(ending in OTHER_TABLES for ending in self.files):
            said.append(AS_JSON_LINES)
        return "; ".join(said)

    def say(self, source: str) -> None:
        """Warn of it, once per process, however often the samples are read."""
        if self.rows or self.files:
            _warn(f"{source}: {self}")


@cache
def _warn(message: str) -> None:
    log.warning("%s", message)
