"""Free memory and speed of this machine, measured in about a second."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SIDE = 1024
_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """Free memory in bytes, and speeds.

    Attributes:
        memory: that processes can still take.
        device_memory: free on the GPU; None where torch computes on the CPU.
        flops: floating-point operations per second in large products, on the device that torch computes on.
        read_rate: bytes per second from the checkpoint; from memory, where the system still has it there.
    """

    memory: int
    device_memory: int | None
    flops: float
    read_rate: float


def measure_machine(device: str, files: Iterable[Path]) -> Machine:
    """Measure this machine.

    Args:
        device: as in `choose_device`: auto, cpu or cuda. Only for cpu torch is not imported.
        files: of the checkpoint; the largest one is read from.
    """
    largest = max(files, key=lambda path: path.stat().st_size)
    if device != "cpu":
        from mode_gguf.forward.gpu_speed import free_and_flops

        if found := free_and_flops():
            return Machine(available_memory(), *found, _read_rate(largest))
    return Machine(available_memory(), None, _cpu_flops(), _read_rate(largest))


def available_memory() -> int:
    """Bytes that new processes can take without pushing others out."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return total_memory()


def total_memory() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits_half_of_memory(mapped: int) -> bool:
    """Whether a mapped file of `mapped` bytes leaves half of the memory free; a larger reference is not run."""
    return mapped <= total_memory() / 2


def _cpu_flops() -> float:
    """Operations per second in large float32 products."""
    a = np.random.default_rng(0).random((_SIDE, _SIDE), np.float32)
    seconds = []
    for _ in range(4):  # the first one starts the library's threads
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * _SIDE**3 / min(seconds)


def _read_rate(path: Path) -> float:
    """Bytes per second from the end of a file."""
    size = path.stat().st_size
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        file.seek(max(0, size - _READ_BYTES))
        read = 0
        while block := file.read(1 << 20):
            read += len(block)
    return max(read, 1) / max(time.perf_counter() - started, 1e-9)
