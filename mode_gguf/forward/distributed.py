"""One measurement shared out over several processes, as torchrun starts them: one per GPU, on one machine or several.

The first process runs the program, and alone reads and writes the work folder and speaks to people. What is worth
sharing out it calls through `on_all_ranks`; the others wait for that, compute it together with the first one, each on
its `share_of` the samples, and wait again. So nothing outside a measurement needs to know that there are others, and
outside of one, or without a launcher, every function here does what it does for a single process.

Processes meet in collectives, and one that failed would leave the others waiting in theirs. Therefore every collective
is preceded by an exchange of errors (`raise_on_all_ranks`), which a failed process joins once, wherever it failed: all
then raise what one of them did. One that is gone without a word breaks the connections to it, which ends the others.

What is exchanged lies in main memory, in float64, and is small beside what is computed: gloo does for it whatever
device computes, and tells of errors where NCCL would wait.
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
"""The others wait while the first process packs and validates; who is gone shows in its connections, not in time."""


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that one launcher started.

    Attributes:
        rank: its number among all; size: how many there are.
        local_rank, local_size: the same among those on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "Place":
        """As a launcher of torch.distributed tells it; the only process where none does.

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
    """The connection to the other processes.

    Attributes:
        busy: whether a measurement is under way that all take part in.
        broken: whether the others can no longer be counted on to listen.
    """

    place: Place
    busy: bool = False
    broken: bool = False


_together: _ProcessGroup | None = None


# --- the program ------------------------------------------------------------------------------------------------------


@contextmanager
def leading() -> Iterator[None]:
    """The first process's program; the others end with it. Nothing happens where there are no others.

    Raises:
        UsageError: see `Place.from_environment`.
        MissingResourceError: the others cannot be reached.
    """
    global _together
    place = Place.from_environment()
    if place.size == 1:
        yield
        return
    _together = _joined(place)
    try:
        yield
    finally:
        # Left by Ctrl-C in the middle of a measurement, the others do not listen; the launcher ends them.
        if not _together.busy and not _together.broken:
            _broadcast(None)
            _leave()
        _together = None


def is_follower() -> bool:
    """Whether this process is to `follow` another one.

    Raises:
        UsageError: see `Place.from_environment`.
    """
    return Place.from_environment().rank > 0


def follow() -> None:
    """Take part, silently, in whatever the first process calls `on_all_ranks`, until its program ends.

    Errors are the first process's to tell.

    Raises:
        MissingResourceError: the first process is gone.
    """
    global _together
    logging.disable()
    warnings.simplefilter("ignore")
    _together = _joined(Place.from_environment())
    while (shared := _broadcast(None)) is not None:
        try:
            _taking_part(_together, shared)
        except Exception:
            if _together.broken:
                raise
    _leave()


def end_process(code: str | int | None) -> None:
    """Exit with a `SystemExit`'s code, at once, if this process is one of several; return if it is alone.

    gloo's threads outlive a connection that broke, and abort a process whose interpreter they find taken down.
    """
    if "torch.distributed" not in sys.modules or Place.from_environment().size == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def on_all_ranks(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function` of these arguments, which all processes call together; only the first one is given `progress`.

    Returns:
        What it returned here, which must be the same everywhere: what all processes found.

    Raises:
        Exception: what it raised in any process.
    """
    if _together is None:
        return function(*args, **kwargs)
    shared: Callable[..., T] = function
    silently = {name: value for name, value in kwargs.items() if name != "progress"}
    _broadcast(partial(shared, *args, **silently))
    return _taking_part(_together, partial(function, *args, **kwargs))


def _taking_part(together: _ProcessGroup, work: Callable[[], T]) -> T:
    """`work`, with what it raises in one process raised in all."""
    together.busy = True
    try:
        result = work()
        raise_on_all_ranks()
    except Exception as error:
        if together.busy and not together.broken:
            raise_on_all_ranks(error)
        raise
    together.busy = False
    return result


# --- within what is called everywhere ---------------------------------------------------------------------------------


def share_of(samples: Sequence[T]) -> Sequence[T]:
    """The samples that are this process's: every size-th one, so that kinds that come in a row are spread evenly.

    Raises:
        UsageError: there are fewer samples than processes.
    """
    place = _place()
    if len(samples) < place.size:
        raise UsageError(
            f"{len(samples)} samples cannot be shared out over {place.size} processes: start fewer processes, or "
            "give more samples"
        )
    return samples[place.rank :: place.size]


def number_among_all(number: int) -> int:
    """The number among all samples of the one that has `number` in this process's share."""
    place = _place()
    return place.rank + number * place.size


def gathered(value: T) -> list[T]:
    """Every process's value, by rank."""
    if _together is None or not _together.busy:
        return [value]
    return _exchanged(_together, None, value)


def gathered_in_order(parts: Sequence[T]) -> list[T]:
    """What every process has, one part for each sample of its share, in the order of all samples."""
    shares = gathered(list(parts))
    return [shares[n % len(shares)][n // len(shares)] for n in range(sum(map(len, shares)))]


def sum_over_ranks(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums of every process's arrays, by name; the same bits everywhere. One that a process lacks counts as zeros."""
    if _together is None or not _together.busy:
        return dict(arrays)
    import torch
    from torch import distributed

    sums = {}
    forms = gathered({name: (array.shape, array.dtype.str) for name, array in arrays.items()})
    for name, (shape, dtype) in {name: form for forms_there in forms for name, form in forms_there.items()}.items():
        total = np.array(arrays[name]) if name in arrays else np.zeros(shape, dtype)
        _connected(_together, partial(distributed.all_reduce, torch.from_numpy(total)))
        sums[name] = total
    return sums


def raise_on_all_ranks(error: Exception | None = None) -> None:
    """Wait for all processes, and tell them of `error`.

    Raises:
        Exception: `error`, or else the error of the first process that told of one.
    """
    if _together is not None and _together.busy:
        _exchanged(_together, error, None)


def local_rank() -> int | None:
    """Which of its machine's devices is this process's; None if it is alone."""
    return _place().local_rank if _place().size > 1 else None


def n_threads() -> int:
    """How many threads this process should compute with, at least 1: its part of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // _place().local_size)


def _place() -> Place:
    """This process's place in the measurement that is under way; outside of one it is alone."""
    return _together.place if _together is not None and _together.busy else Place()


# --- connections ------------------------------------------------------------------------------------------------------


def _joined(place: Place) -> _ProcessGroup:
    from torch import distributed

    together = _ProcessGroup(place)
    with _stdout_to_stderr():  # gloo reports its connections there, where a command's result goes
        connect = partial(distributed.init_process_group, "gloo", rank=place.rank, world_size=place.size)
        _connected(together, partial(connect, timeout=_LONGEST_WAIT))
    return together


def _leave() -> None:
    from torch import distributed

    distributed.destroy_process_group()


def _broadcast(value: Any) -> Any:
    """The first process's `value`."""
    from torch import distributed

    if _together is None:
        raise RuntimeError("not connected to other processes")
    box = [value]
    _connected(_together, partial(distributed.broadcast_object_list, box, src=0))
    return box[0]


def _exchanged(together: _ProcessGroup, error: Exception | None, value: T) -> list[T]:
    """Every process's value, by rank; or the end of what is being done, if any of them has an error."""
    from torch import distributed

    boxes: list[Any] = [None] * together.place.size
    mine = (error and _told(error, together.place.rank), value)
    _connected(together, partial(distributed.all_gather_object, boxes, mine))
    first = next((found for found, _ in boxes if found is not None), None)
    if first is not None:
        together.busy = False
        raise error or first
    return [value for _, value in boxes]


def _told(error: Exception, rank: int) -> Exception:
    """`error` as another process can raise it: with what people need to see, if nobody expected it."""
    if isinstance(error, ModeGgufError | OSError):
        return error
    return RuntimeError(f"in process {rank}:\n{''.join(traceback.format_exception(error))}")


def _connected(together: _ProcessGroup, exchange: Callable[[], T]) -> T:
    """What torch.distributed returns, or a message for people when another process is gone."""
    try:
        return exchange()
    except RuntimeError as error:
        together.broken = True
        raise MissingResourceError(
            f"process {together.place.rank} of {together.place.size} lost its connection to another one, which ended "
            f"without a word, perhaps for lack of memory ({str(error).partition('. ')[0]})"
        ) from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever writes to file descriptor 1 writes to 2 instead."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
