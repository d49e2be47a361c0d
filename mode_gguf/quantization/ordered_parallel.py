"""A thread pool that yields results in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ordered_parallel(task: Callable[[int], T], count: int, threads: int) -> Iterator[T]:
    """Results of task(0) ... task(count - 1), with at most `threads` of them under way or waiting to be taken.

    An error of a task is raised when its turn comes; then, or when the iterator is closed, the rest is not started.
    """
    executor = ThreadPoolExecutor(threads, thread_name_prefix="packing")
    pending: deque[Future[T]] = deque()
    try:
        for index in range(count):
            pending.append(executor.submit(task, index))
            if len(pending) == threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
