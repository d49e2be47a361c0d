"""Which llama.cpp runs a file in this process: the embedded one, or our own build where experts have a type each."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mode_gguf.errors import MissingResourceError
from mode_gguf.gguf_header import read_header
from mode_gguf.quantization.expert_groups import ARCHITECTURE_SUFFIX
from mode_gguf.runtime.installed import HOW_TO_BUILD, Runtime, find_runtime
from mode_gguf.runtime.release import B11434
from mode_gguf.validation import c_api


@dataclass(frozen=True, slots=True)
class Engine:
    """A llama.cpp that models are run in; logits of different engines are not compared.

    Attributes:
        version: how reports name it.
        folder: programs and libraries of a build of our own; None is the embedded llama.cpp.
    """

    version: str
    folder: Path | None = None

    def library(self) -> ctypes.CDLL:
        """Its C API, ready to use.

        Raises:
            MissingResourceError: it cannot be loaded, or is another one than expected.
        """
        return c_api.runtime_library(self.folder) if self.folder else c_api.library()


def has_expert_groups(metadata: Mapping[str, Any]) -> bool:
    """Whether a file with this metadata stores one type per expert."""
    return str(metadata.get("general.architecture", "")).endswith(ARCHITECTURE_SUFFIX)


def engine_for(*models: Path) -> Engine:
    """The engine that runs all of `models`: the embedded one, unless one of them has one type per expert.

    Raises:
        InputError: a file is missing or is not GGUF.
        MissingResourceError: our own build is needed and is not there.
    """
    for model in models:
        if has_expert_groups(read_header(model).metadata):
            runtime = needed_runtime(model)
            return Engine(runtime.version, runtime.bin)
    return Engine(c_api.library_version())


def needed_runtime(model: Path) -> Runtime:
    """Our own build, for `model`, which nothing else can run.

    Raises:
        MissingResourceError: it is not there.
    """
    runtime = find_runtime()
    if runtime is None:
        raise MissingResourceError(
            f"{model}: has one type per expert and needs llama.cpp {B11434.name} with expert groups; {HOW_TO_BUILD}"
        )
    return runtime
