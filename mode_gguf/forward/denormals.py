"""Flushing of denormal floating-point numbers to zero, for speed."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Context manager and decorator: denormals are flushed to zero, in this thread and those it starts.

    Gates that are shut leave activations and gradients below 1e-38, on which CPUs compute a hundred times slower: a
    measurement of the demo checkpoint took three times as long. Nothing that goes into a file may be packed in here:
    ggml keeps denormals.
    """
    flushed_before = _flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)


def _flushes() -> bool:
    smallest = np.finfo(np.float32).tiny
    return bool(np.float32(smallest) * np.float32(0.5) == 0)
