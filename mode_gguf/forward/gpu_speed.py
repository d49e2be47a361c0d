"""Free memory and matrix-product speed of torch's GPU."""

import time

import torch

_MATRIX_SIZE = 4096


def free_and_flops() -> tuple[int, float] | None:
    """Free bytes on the GPU and its operations per second in large bfloat16 products; None where torch has none."""
    if not torch.cuda.is_available():
        return None
    free = torch.cuda.mem_get_info()[0]
    a = torch.rand(_MATRIX_SIZE, _MATRIX_SIZE, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(4):  # the first one loads the library
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return free, 2 * _MATRIX_SIZE**3 / min(seconds)
