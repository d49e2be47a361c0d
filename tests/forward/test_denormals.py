"""Denormals are flushed where asked, and nowhere else: packing in the same process must see them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mode_gguf.forward.denormals import denormals_flushed

TINY = torch.full((4,), float(np.finfo(np.float32).tiny))


def halved() -> float:
    return float((TINY * 0.5).max())


def test_flushed_inside_and_in_threads_started_there() -> None:
    assert halved() > 0
    with denormals_flushed(), ThreadPoolExecutor(1) as pool:
        assert halved() == 0
        assert pool.submit(halved).result() == 0
        with denormals_flushed():
            assert halved() == 0
        assert halved() == 0
    assert halved() > 0


def test_an_error_does_not_leak_the_setting() -> None:
    def fail() -> None:
        with denormals_flushed():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert halved() > 0
