"""Builds of llama.cpp that this machine has for tests, by the environment variables that name their folders."""

import os
from pathlib import Path
from typing import Final

import pytest

STOCK: Final = "MODE_GGUF_STOCK_BUILD"
PATCHED: Final = "MODE_GGUF_PATCHED_BUILD"


def named_build(variable: str) -> Path:
    """The folder with a build's libraries and programs; skips the test where the machine has none."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no folder with a build of llama.cpp")
    assert (Path(folder) / "libllama.so").exists(), f"{variable}: {folder} holds no libllama.so"
    return Path(folder)
