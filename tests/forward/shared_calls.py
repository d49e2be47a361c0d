"""What the tests of several processes have them do; light, because every process imports it."""

import os
import signal

import numpy as np

from mode_gguf.errors import InputError
from mode_gguf.forward import distributed


def shared_out(n_samples: int) -> tuple[list[str], list[list[int]], dict[str, np.ndarray], int, bool]:
    """What each function makes of the numbers 0 to n - 1."""
    mine = distributed.share_of(range(n_samples))
    assert [distributed.number_among_all(number) for number in range(len(mine))] == list(mine)
    arrays = {"sum": np.array([[sum(mine)]], np.float64), "count": np.array([len(mine)])}
    if mine[0] == 0:
        arrays["only the first"] = np.array([0.5, np.nan])
    return (
        distributed.gathered_in_order([f"sample {number}" for number in mine]),
        distributed.gathered(list(mine)),
        distributed.sum_over_ranks(arrays),
        distributed.n_threads(),
        distributed.local_rank() is None,
    )


def fails_in(rank: int, *, expected: bool) -> None:
    """One process fails, the others wait for it in a sum."""
    if distributed.number_among_all(0) == rank:
        if expected:
            raise InputError(f"{rank}.txt: nothing in it")
        raise KeyError("no such key")
    distributed.sum_over_ranks({"x": np.zeros(3)})
    raise AssertionError("the others went on")


def ends_without_a_word() -> None:
    if distributed.number_among_all(0) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.raise_on_all_ranks()
