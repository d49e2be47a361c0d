"""Refusals of files that claim more than they hold."""

import time
import tracemalloc
from collections.abc import Callable

import pytest

from mode_gguf.errors import InputError


def refused_at_once(call: Callable[[], object], match: str) -> None:
    """One short InputError, in little time and memory."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - started < 5
