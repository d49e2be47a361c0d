"""Data-parallel measurements over the processes of torchrun: one per GPU, on one machine or several.

The first process runs the program, and alone reads and writes the work folder and prints. It calls a measurement
through `on_all_ranks`; the others wait for that, compute it together with the first one, each on its `share_of` the
samples, and wait again. So nothing outside a measurement needs to know that there are others, and outside of one, or
without a launcher, every function here does what it does for a single process.

Processes meet in collectives, and one that failed would leave the others waiting in theirs. Therefore every collective
is preceded by an exchange of errors (`raise_on_all_ranks`), which a failed process joins once, wherever it failed: all
then raise what one of them did. One that is gone without a word breaks the connections to it, which ends the others.

Exchanged arrays lie in main memory, in float64, and are small: gloo does for them whatever device computes, and reports
errors where NCCL would wait.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np

from mode_gguf.errors import MissingResourceError, ModeGgufError, UsageError

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=30)
"""Timeout of collectives: others wait while the first process packs and validates; a lost one breaks connections."""


@dataclass(frozen=True, slots=True)
class ProcessRank:
    """Rank of a process among those that one launcher started.

    Attributes:
        rank: its number among all; size: how many there are.
        local_rank, local_size: the same among those on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "ProcessRank":
        """Rank from the environment variables of torch.distributed's launchers; the only process where none is set.

        Raises:
            UsageError: the launcher's variables are incomplete or no numbers.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: "
                "start several processes with torchrun, or unset WORLD_SIZE"
            )
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except ValueError as error:
            raise UsageError(f"{', '.join(names)} must be whole numbers, as torchrun sets them ({error})") from error


@dataclass(slots=True)
class _ProcessGroup:
    """The process group: the connection to the other processes.

    Attributes:
        busy: whether a measurement is under way that all take part in.
        broken: whether the others can no longer be counted on to listen.
    """

    process: ProcessRank
    busy: bool = False
    broken: bool = False


_group: _ProcessGroup | None = None


# --- the program ------------------------------------------------------------------------------------------------------


@contextmanager
def leading() -> Iterator[None]:
    """Context of the first process's program; the others end with it. Does nothing for a single process.

    Raises:
        UsageError: see `ProcessRank.from_environment`.
        MissingResourceError: the others cannot be reached.
    """
    global _group
    process = ProcessRank.from_environment()
    if process.size == 1:
        yield
        return
    _group = _joined(process)
    try:
        yield
    finally:
        # Left by Ctrl-C in the middle of a measurement, the others do not listen; the launcher ends them.
        if not _group.busy and not _group.broken:
            _broadcast(None)
            _leave()
        _group = None


def is_follower() -> bool:
    """Whether this process is to `follow` another one.

    Raises:
        UsageError: see `ProcessRank.from_environment`.
    """
    return ProcessRank.from_environment().rank > 0


def follow() -> None:
    """Run every function that the first process calls `on_all_ranks`, silently, until its program ends.

    Errors are reported by the first process.

    Raises:
        MissingResourceError: the first process is gone.
    """
    global _group
    logging.disable()
    warnings.simplefilter("ignore")
    _group = _joined(ProcessRank.from_environment())
    while (shared := _broadcast(None)) is not None:
        try:
            _run_on_all_ranks(_group, shared)
        except Exception:
            if _group.broken:
                raise
    _leave()


def end_process(code: str | int | None) -> None:
    """Exit with a `SystemExit`'s code, at once, if this process is one of several; return if it is alone.

    gloo's threads outlive a connection that broke, and abort a process whose interpreter they find taken down.
    """
    if "torch.distributed" not in sys.modules or ProcessRank.from_environment().size == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def on_all_ranks(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` with these arguments in all processes together; only the first one gets `progress`.

    Returns:
        The function's result, which must be the same in all processes.

    Raises:
        Exception: the error that it raised in any process.
    """
    if _group is None:
        return function(*args, **kwargs)
    shared: Callable[..., T] = function
    silently = {name: value for name, value in kwargs.items() if name != "progress"}
    _broadcast(partial(shared, *args, **silently))
    return _run_on_all_ranks(_group, partial(function, *args, **kwargs))


def _run_on_all_ranks(group: _ProcessGroup, function: Callable[[], T]) -> T:
    """Call `function`; an error in one process is raised in all."""
    group.busy = True
    try:
        result = function()
        raise_on_all_ranks()
    except Exception as error:
        if group.busy and not group.broken:
            raise_on_all_ranks(error)
        raise
    group.busy = False
    return result


# --- inside a measurement ---------------------------------------------------------------------------------------------


def share_of(samples: Sequence[T]) -> Sequence[T]:
    """This process's share of the samples: every size-th one, so that neighbours of one modality are spread evenly.

    Raises:
        UsageError: there are fewer samples than processes.
    """
    process = _this_process()
    if len(samples) < process.size:
        raise UsageError(
            f"{len(samples)} samples cannot be shared out over {process.size} processes: start fewer processes, or "
            "give more samples"
        )
    return samples[process.rank :: process.size]


def global_index(number: int) -> int:
    """Index among all samples of sample `number` of this process's share."""
    process = _this_process()
    return process.rank + number * process.size


def gathered(value: T) -> list[T]:
    """Every process's value, by rank."""
    if _group is None or not _group.busy:
        return [value]
    return _all_gather(_group, None, value)


def gathered_in_order(parts: Sequence[T]) -> list[T]:
    """Values of all processes in the order of all samples; `parts` are this process's, one per sample of its share."""
    shares = gathered(list(parts))
    return [shares[n % len(shares)][n // len(shares)] for n in range(sum(map(len, shares)))]


def sum_over_ranks(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums of every process's arrays, by name; the same bits everywhere. One that a process lacks counts as zeros."""
    if _group is None or not _group.busy:
        return dict(arrays)
    import torch
    from torch import distributed

    sums = {}
    forms = gathered({name: (array.shape, array.dtype.str) for name, array in arrays.items()})
    for name, (shape, dtype) in {name: form for forms_there in forms for name, form in forms_there.items()}.items():
        total = np.array(arrays[name]) if name in arrays else np.zeros(shape, dtype)
        _collective(_group, partial(distributed.all_reduce, torch.from_numpy(total)))
        sums[name] = total
    return sums


def raise_on_all_ranks(error: Exception | None = None) -> None:
    """Barrier that raises any process's `error` in all of them.

    Raises:
        Exception: `error`, or else that of the first process that has one.
    """
    if _group is not None and _group.busy:
        _all_gather(_group, error, None)


def local_rank() -> int | None:
    """Index of this process's device on its machine; None for a single process."""
    return _this_process().local_rank if _this_process().size > 1 else None


def n_threads() -> int:
    """Compute threads of this process, at least 1: its part of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // _this_process().local_size)


def _this_process() -> ProcessRank:
    """This process's rank in the current measurement; outside of one it is a single process."""
    return _group.process if _group is not None and _group.busy else ProcessRank()


# --- connections ------------------------------------------------------------------------------------------------------


def _joined(process: ProcessRank) -> _ProcessGroup:
    from torch import distributed

    group = _ProcessGroup(process)
    with _stdout_to_stderr():  # gloo reports its connections there, where a command's result goes
        connect = partial(distributed.init_process_group, "gloo", rank=process.rank, world_size=process.size)
        _collective(group, partial(connect, timeout=_LONGEST_WAIT))
    return group


def _leave() -> None:
    from torch import distributed

    distributed.destroy_process_group()


def _broadcast(value: Any) -> Any:
    """The first process's `value`."""
    from torch import distributed

    if _group is None:
        raise RuntimeError("not connected to other processes")
    values = [value]
    _collective(_group, partial(distributed.broadcast_object_list, values, src=0))
    return values[0]


def _all_gather(group: _ProcessGroup, error: Exception | None, value: T) -> list[T]:
    """All processes' values, by rank; ends the measurement and raises if any of them has an error."""
    from torch import distributed

    gathered_values: list[Any] = [None] * group.process.size
    own_value = (error and _picklable_error(error, group.process.rank), value)
    _collective(group, partial(distributed.all_gather_object, gathered_values, own_value))
    first = next((found for found, _ in gathered_values if found is not None), None)
    if first is not None:
        group.busy = False
        raise error or first
    return [value for _, value in gathered_values]


def _picklable_error(error: Exception, rank: int) -> Exception:
    """`error` as another process can raise it; an unexpected one as a RuntimeError with its traceback."""
    if isinstance(error, ModeGgufError | OSError):
        return error
    return RuntimeError(f"in process {rank}:\n{''.join(traceback.format_exception(error))}")


def _collective(group: _ProcessGroup, exchange: Callable[[], T]) -> T:
    """Run a collective; a lost process is raised as a MissingResourceError."""
    try:
        return exchange()
    except RuntimeError as error:
        group.broken = True
        raise MissingResourceError(
            f"process {group.process.rank} of {group.process.size} lost its connection to another one, which ended "
            f"without a word, perhaps for lack of memory ({str(error).partition('. ')[0]})"
        ) from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirection of file descriptor 1 to 2, for the C library too."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
