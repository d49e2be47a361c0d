"""Choice of the llama.cpp library that runs a file: embedded, the user's, or our own for a type per expert."""

import ctypes
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.gguf.header import read_header
from mode_gguf.llama_cpp import c_api
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.runtime.installed import HOW_TO_BUILD, Runtime, find_runtime
from mode_gguf.llama_cpp.runtime.pinned_release import B11434
from mode_gguf.llama_cpp_library import SUBFOLDERS
from mode_gguf.quantization.expert_groups import ARCHITECTURE_SUFFIX

_LIBRARY_FOLDERS: Final = (*SUBFOLDERS, "lib")
_BUILD = re.compile(r"\(build (\d+)|^(\d+) \(")
"""Build number in the output of `--version`: "0.6.0-dev (build 11434, commit ...)", or "7777 (abcdef)"."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """A llama.cpp that models are run in; logits of different engines are not compared.

    Attributes:
        version: how reports name it.
        folder: shared libraries, and programs if any, of another build; None is the embedded llama.cpp.
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


def named_engine(folder: Path) -> Engine:
    """The build with shared libraries that the user names: an installation, a build tree, its `bin` or `lib`.

    Which build it is comes from a program beside the libraries. Where none says so, the layout of its structures, which
    is checked before use in any case, decides alone.

    Raises:
        InputError: there is no libmtmd in it.
        MissingResourceError: it is older than the oldest build whose structures are known here.
    """
    places = [path for sub in _LIBRARY_FOLDERS if next((path := folder / sub).glob("libmtmd.*"), None)]
    if not places:
        raise InputError(
            f"{folder}: holds no libmtmd; name the folder that llama.cpp was built into with BUILD_SHARED_LIBS=ON"
        )
    build = _build_number(places[0], folder)
    if build is None:
        logger.warning("%s: no program says which build it is; its structures are checked before use", folder)
    elif build < B11434.build:
        raise MissingResourceError(
            f"{folder}: llama.cpp build {build} found, {B11434.build} or newer expected; build a newer release, or "
            "leave --library out to use the embedded one"
        )
    return Engine(f"llama.cpp b{build or ' of unknown build'} in {places[0].resolve()}", places[0].resolve())


def _build_number(*folders: Path) -> int | None:
    for folder in folders:
        try:
            found = _BUILD.search(find_llama_cpp(folder).version or "")
        except InputError:
            continue  # libraries alone
        if found and (number := int(found[1] or found[2])) > 1:  # 0 or 1: built from a tree without git
            return number
    return None


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
