"""How long work tells whoever is watching; the library never prints."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """`with progress.step("packing", total) as advance: ... advance(1)`; an implementation needs nothing else."""

    def step(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Announce `total` units of work; the context yields a function that counts them off."""
        ...


class _Silent:
    @contextmanager
    def step(self, description: str, total: int) -> Iterator[Advance]:
        yield lambda n: None


silent: Progress = _Silent()
