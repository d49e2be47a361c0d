"""Functions that the tests of several processes call in them; light, because every process imports it."""

import os
import signal

import numpy as np

from mode_gguf.errors import InputError
from mode_gguf.forward import distributed


def shared_out(n_samples: int) -> tuple[list[str], list[list[int]], dict[str, np.ndarray], int, bool]:
    """Results of each function on the numbers 0 to n - 1."""
    own = distributed.share_of(range(n_samples))
    assert [distributed.global_index(number) for number in range(len(own))] == list(own)
    arrays = {"sum": np.array([[sum(own)]], np.float64), "count": np.array([len(own)])}
    if own[0] == 0:
        arrays["only the first"] = np.array([0.5, np.nan])
    return (
        distributed.gathered_in_order([f"sample {number}" for number in own]),
        distributed.gathered(list(own)),
        distributed.sum_over_ranks(arrays),
        distributed.n_threads(),
        distributed.local_rank() is None,
    )


def fails_in(rank: int, *, expected: bool) -> None:
    """One process fails, the others wait for it in a sum."""
    if distributed.global_index(0) == rank:
        if expected:
            raise InputError(f"{rank}.txt: nothing in it")
        raise KeyError("no such key")
    distributed.sum_over_ranks({"x": np.zeros(3)})
    raise AssertionError("the others went on")


def ends_without_a_word() -> None:
    if distributed.global_index(0) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.raise_on_all_ranks()
