"""Data-parallel processes: shares and sums, and an error in one of them ends the measurement in all."""

import os
import pickle
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mode_gguf.errors import UsageError
from mode_gguf.forward import distributed
from mode_gguf.forward.distributed import ProcessRank
from mode_gguf.forward.streaming import choose_device
from tests.forward import shared_calls
from tests.together import called_together, ended, start_together

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_shares_and_sums_of_three_processes(tmp_path: Path) -> None:
    calls = [
        partial(shared_calls.shared_out, 7),
        partial(shared_calls.shared_out, 2),
        partial(shared_calls.shared_out, 3),
    ]
    seven, two, three = called_together(calls, 3, tmp_path)
    in_order, shares, sums, n_threads, alone = seven
    assert in_order == [f"sample {number}" for number in range(7)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    np.testing.assert_array_equal(sums["sum"], [[21.0]])
    assert (sums["count"].tolist(), sums["count"].dtype) == ([7], np.int64)
    np.testing.assert_array_equal(sums["only the first"], [0.5, np.nan])
    assert n_threads == max(1, (os.cpu_count() or 1) // 3)
    assert not alone
    assert two.startswith("UsageError: 2 samples cannot be shared out over 3 processes")
    assert three[1] == [[0], [1], [2]]


def test_an_error_in_any_process_is_raised_in_all(tmp_path: Path) -> None:
    """And only once: what is called afterwards runs as if nothing had been."""
    calls: list[Callable[[], Any]] = [
        partial(shared_calls.fails_in, 1, expected=True),
        partial(shared_calls.fails_in, 0, expected=True),
        partial(shared_calls.fails_in, 1, expected=False),
        partial(shared_calls.shared_out, 4),
    ]
    one, zero, unexpected, afterwards = called_together(calls, 2, tmp_path)
    assert one == "InputError: 1.txt: nothing in it"
    assert zero == "InputError: 0.txt: nothing in it"
    assert unexpected.startswith("RuntimeError: in process 1:")
    assert "KeyError: 'no such key'" in unexpected
    assert afterwards[1] == [[0, 2], [1, 3]]


def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "calls").write_bytes(pickle.dumps([shared_calls.ends_without_a_word]))
    first, killed = ended(start_together(["-m", "tests.together", tmp_path / "calls", tmp_path / "results"], 2))
    assert killed[0] == -signal.SIGKILL
    result = pickle.loads((tmp_path / "results").read_bytes())
    assert first[0] == 0
    assert result[0].startswith("MissingResourceError: process 0 of 2 lost its connection to another one")


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    array = np.arange(3)
    with distributed.leading():
        assert not distributed.is_follower()
        assert distributed.on_all_ranks(sorted, [2, 1]) == [1, 2]
        assert distributed.sum_over_ranks({"x": array})["x"] is array
        assert list(distributed.share_of([5, 6])) == [5, 6]
        assert distributed.gathered_in_order([5, 6]) == [5, 6]
        assert distributed.local_rank() is None


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"):
        ProcessRank.from_environment()
    for name, value in {**LAUNCHED, "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "one"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="whole numbers"):
        ProcessRank.from_environment()


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    group = distributed._ProcessGroup(ProcessRank(rank=5, size=8, local_rank=1, local_size=4), busy=True)
    monkeypatch.setattr(distributed, "_group", group)
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    group.process = ProcessRank(rank=6, size=8, local_rank=2, local_size=4)
    with pytest.raises(UsageError, match="process 2 of this machine has no GPU of its own, torch finds 2"):
        choose_device("auto")
    group.busy = False  # outside of a measurement the first process is like any other
    assert choose_device("auto") == torch.device("cuda")
