"""The interface for progress reports; the library never prints."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """A progress display: `with progress.step("packing", total) as advance: ... advance(1)`."""

    def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> AbstractContextManager[Advance]:
        """Announce `total` units of work; the context yields a function that counts them off.

        Args:
            unit: what is counted, such as `tokens`, `weights` or `bytes`; empty for mere steps.
            layers: equal parts of the work, one after the other; speed is reported for all of them together, so that
                `tokens` are those that have passed the whole model.
        """
        ...


class _Silent:
    @contextmanager
    def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> Iterator[Advance]:
        yield lambda n: None


silent: Progress = _Silent()
