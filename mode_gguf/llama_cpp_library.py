"""Places of llama.cpp on this machine: inside the package `xllamacpp`, and in a folder that the user names."""

import importlib.machinery
import importlib.util
import os
from pathlib import Path
from typing import Final

ENVIRONMENT_VARIABLE: Final = "MODE_GGUF_LLAMA_CPP"
SUBFOLDERS: Final = (".", "bin", "build/bin")
"""Subfolders of an installation or a build tree that hold programs and libraries."""


def embedded_library() -> Path | None:
    """The shared object inside the installed `xllamacpp`, llama.cpp and ggml in one, found without importing it."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    paths = (folder / f"xllamacpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def named_folder() -> Path | None:
    """The folder that MODE_GGUF_LLAMA_CPP names, if it is set."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else None
