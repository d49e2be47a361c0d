"""Calls shared out over several processes that this machine runs, as torchrun would start them; without a GPU.

`python -m tests.together CALLS RESULTS` is one of them: CALLS holds pickled functions without arguments, and RESULTS
gets what they returned, or the text of what one of them raised.
"""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mode_gguf.forward.distributed import end_process, follow, is_follower, leading, on_all_ranks

SECONDS = 300
"""Nothing here takes as long; whoever does has hung."""


def start_together(arguments: Sequence[str | Path], n: int) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` as processes 0 to n - 1, with the environment a launcher gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, sys.path))
    here = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **here, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of all of them, once they have ended."""
    try:
        output = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, output, strict=True)]


def called_together(calls: Sequence[Callable[[], Any]], n: int, folder: Path) -> list[Any]:
    """Results of `calls`, or the texts of their exceptions, in the first of `n` processes; the others are silent."""
    paths = folder / "calls.pickle", folder / "results.pickle"
    paths[0].write_bytes(pickle.dumps(list(calls)))
    first, *others = ended(start_together(["-m", "tests.together", *paths], n))
    assert first[0] == 0, first[2]
    assert all(other == (0, "", "") for other in others), others
    results: list[Any] = pickle.loads(paths[1].read_bytes())
    return results


def _result_of(call: Callable[[], Any]) -> Any:
    try:
        return on_all_ranks(call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    if is_follower():
        follow()
    else:
        calls, results = map(Path, sys.argv[1:])
        with leading():
            results.write_bytes(pickle.dumps([_result_of(call) for call in pickle.loads(calls.read_bytes())]))
    end_process(0)


if __name__ == "__main__":
    main()
