"""The command line that runs a GGUF file in the llama.cpp program that can load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mode_gguf.errors import MissingResourceError, UsageError
from mode_gguf.gguf.header import read_header
from mode_gguf.llama_cpp.engines import has_expert_groups, needed_runtime
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.runtime.installed import HOW_TO_BUILD, find_runtime

_WITH_PROJECTOR: Final = ("llama-server", "llama-mtmd-cli")


def command_line(
    model: Path, tool: str, mmproj: Path | None = None, extra: Sequence[str] = (), llama_cpp: Path | None = None
) -> list[str]:
    """Arguments to execute: `tool` with `model`, its projector, and `extra` as given.

    A file with one type per expert needs our own build. Any other is run by the user's llama.cpp (see
    `find_llama_cpp`), or by our build if that is all there is.

    Raises:
        UsageError: a projector for a tool that takes none.
        InputError: a file is missing or is not GGUF, or `llama_cpp` names a folder without programs.
        MissingResourceError: there is no such program; the message says how to get it.
    """
    if mmproj and tool not in _WITH_PROJECTOR:
        raise UsageError(f"--mmproj: {tool} takes no projector, only {' and '.join(_WITH_PROJECTOR)} do")
    metadata = read_header(model).metadata
    if mmproj:
        read_header(mmproj)
    program = _in_folder(needed_runtime(model).bin, tool) if has_expert_groups(metadata) else _any(tool, llama_cpp)
    projector = ["--mmproj", str(mmproj)] if mmproj else []
    return [str(program), "-m", str(model), *projector, *extra]


def _any(tool: str, llama_cpp: Path | None) -> Path:
    users = find_llama_cpp(llama_cpp)[tool]
    if users:
        return users
    runtime = find_runtime()
    if runtime is None:
        raise MissingResourceError(
            f"{tool} was not found: name the folder of your llama.cpp with --llama-cpp or MODE_GGUF_LLAMA_CPP, put it "
            f"on the PATH, or {HOW_TO_BUILD}"
        )
    return _in_folder(runtime.bin, tool)


def _in_folder(folder: Path, tool: str) -> Path:
    program = find_llama_cpp(folder)[tool]
    if program is None:
        raise MissingResourceError(f"{folder}: {tool} is missing; {HOW_TO_BUILD} --rebuild")
    return program
