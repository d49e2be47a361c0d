"""Speed of a type per expert on this machine, measured by llama-bench on a model with random weights.

Two ways of computing are built in (docs/design/per-expert-layout.md): "skip", where a product passes over experts of
other groups, which only the CPU does, and "mask", which works anywhere and computes such rows for nothing.
"""

import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mode_gguf.errors import MissingResourceError
from mode_gguf.llama_cpp.runtime.installed import Runtime
from mode_gguf.llama_cpp.runtime.random_model import RandomModelShape, random_groups, write_random_model
from mode_gguf.progress import Progress, silent

SHAPE: Final = RandomModelShape(hidden=1024, width=512, experts=32, used=4, layers=2, heads=8, kv_heads=2)
GROUPS: Final = ("Q2_K", "Q3_K", "Q4_K")
ROUNDS: Final = 3
_MIDDLE: Final = GROUPS[1]
_TINY: Final = RandomModelShape(hidden=256, width=256, experts=4, used=2, layers=1, heads=4, kv_heads=2)
_WITHOUT_AMX: Final = "CXXFLAGS=-U__AMX_INT8__ "
"""Some virtual machines offer these instructions and fail at them; llama.cpp tests this macro."""
_COUNTS: Final = (11, 11, 10)
_SECONDS: Final = 600


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, medians over rounds."""

    prompt: float
    generation: float


def check_runs(runtime: Runtime) -> None:
    """Compute a little with a build, so that one that does not run here is known at once.

    Raises:
        MissingResourceError: it fails, such as where a virtual machine offers AMX and cannot run it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "drawn.gguf"
        write_random_model(model, _TINY, (_MIDDLE,), random_groups(_TINY, [_TINY.experts]))
        _measure(runtime, model)


def bench(runtime: Runtime, progress: Progress = silent) -> dict[str, Speed]:
    """Speed of experts in one type, and of three types side by side in every way that `runtime` has.

    Raises:
        MissingResourceError: llama-bench is missing or fails.
    """
    ways = ("mask",) if runtime.record.backend == "cuda" else ("skip", "mask")
    measured: dict[str, list[Speed]] = {"one type": [], **{way: [] for way in ways}}
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress.step("speed of a type per expert", ROUNDS * len(measured)) as advance,
    ):
        ordinary, grouped = Path(scratch) / "ordinary.gguf", Path(scratch) / "grouped.gguf"
        write_random_model(ordinary, SHAPE, (_MIDDLE,), random_groups(SHAPE, [SHAPE.experts]))
        write_random_model(grouped, SHAPE, GROUPS, random_groups(SHAPE, _COUNTS))
        for _ in range(ROUNDS):  # round by round, so that other work on the machine meets all alike
            for way, speeds in measured.items():
                speeds.append(_measure(runtime, ordinary) if way == "one type" else _measure(runtime, grouped, way))
                advance(1)
    return {
        way: Speed(
            statistics.median(speed.prompt for speed in speeds), statistics.median(speed.generation for speed in speeds)
        )
        for way, speeds in measured.items()
    }


def _measure(runtime: Runtime, model: Path, way: str | None = None) -> Speed:
    command = [str(runtime.bin / "llama-bench"), "-m", str(model), "-p", "256", "-n", "32", "-r", "1", "-o", "json"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **({"LLAMA_EXPERT_GROUPS": way} if way else {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        lines = done.stderr.decode("utf-8", "replace").split("\n")
        failure = f"exit code {done.returncode}: {' / '.join(lines[-4:-1])}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        killed = failure.startswith("exit code -")
        raise MissingResourceError(
            f"{command[0]} cannot measure: {failure}; build it again with: "
            f"{_WITHOUT_AMX if killed and _has_amx() else ''}mode-gguf runtime build --rebuild"
        )
    speeds = {"prompt" if row["n_prompt"] else "generation": row["avg_ts"] for row in json.loads(done.stdout)}
    return Speed(**speeds)


def _has_amx() -> bool:
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
