"""Python processes of their own, for what Numba decides once per process: the processor, checks, the cache."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, cache: Path, **environment: str) -> str:
    """Standard output of a Python script run from the repository root, with its kernels cached in `cache`."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
