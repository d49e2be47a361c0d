"""Configuring and compiling llama.cpp with CMake."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.llama_cpp.runtime.logged_process import reason, run_logged
from mode_gguf.llama_cpp.runtime.pinned_release import BuildVariant
from mode_gguf.progress import Progress

_LINKED: Final = ("EXE", "SHARED")
_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    # Programs look for their libraries beside themselves, wherever that is, and for CUDA's where it was found.
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON",
    f"-DCMAKE_INSTALL_RPATH={'@loader_path' if sys.platform == 'darwin' else '$ORIGIN'}",
    # And there first, not in LD_LIBRARY_PATH, which may have the libraries of another llama.cpp under the same names.
    *(f"-DCMAKE_{kind}_LINKER_FLAGS_INIT=-Wl,--disable-new-dtags" for kind in _LINKED if sys.platform != "darwin"),
)
_NINJA_DONE = re.compile(r"\[(\d+)/(\d+)\] ")
_MAKE_DONE = re.compile(r"\[ *(\d+)%\] ")
_COMPILER = re.compile(r"-- The CXX compiler identification is (.+)")
_CUDA_PLACES: Final = ("/usr/local/cuda/bin", "/opt/cuda/bin")


@dataclass(frozen=True, slots=True)
class BuildTools:
    """Programs that build: `make` is Ninja or make, `nvcc` is there when it is needed."""

    cmake: str
    make: str
    nvcc: str | None

    @property
    def generator(self) -> str:
        return "Ninja" if "ninja" in Path(self.make).name else "Unix Makefiles"


def find_tools(*, cuda: bool) -> BuildTools:
    """Look on the PATH and beside this Python, where pip puts programs.

    Raises:
        MissingResourceError: one of them is missing.
    """
    cmake = _which("cmake")
    if cmake is None:
        raise MissingResourceError("llama.cpp is built with cmake, which was not found: pip install cmake ninja")
    make = _which("ninja") or _which("ninja-build") or _which("make")
    if make is None:
        raise MissingResourceError("llama.cpp is built with ninja or make, and neither was found: pip install ninja")
    if not any(map(_which, filter(None, (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")))):
        raise MissingResourceError(
            "llama.cpp is built with a C++ compiler, and none was found (c++, g++, clang++, or what CXX names); "
            "install one, such as with: apt install g++"
        )
    nvcc = None
    if cuda:
        nvcc = os.environ.get("CUDACXX") or _which("nvcc", *_CUDA_PLACES)
        if nvcc is None:
            raise MissingResourceError(
                "--cuda needs NVIDIA's compiler nvcc, which was not found on the PATH or in /usr/local/cuda; install "
                "the CUDA toolkit or let CUDACXX name it"
            )
    return BuildTools(cmake, make, nvcc)


def _which(program: str, *places: str) -> str | None:
    folders = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), *places)
    return shutil.which(program, path=os.pathsep.join(folders))


def options_of(variant: BuildVariant) -> tuple[str, ...]:
    """CMake's options; the build number and commit are what programs give as their version."""
    commit = f"expert-groups-{variant.patch_digest}" if variant.patch else "stock"
    version = (f"-DLLAMA_BUILD_NUMBER={variant.release.build}", f"-DLLAMA_BUILD_COMMIT={commit}")
    return (*_OPTIONS, f"-DGGML_CUDA={'ON' if variant.backend == 'cuda' else 'OFF'}", *version)


def configure(tree: Path, build: Path, tools: BuildTools, options: tuple[str, ...], log: Path) -> str:
    """Prepare the folder `build`; the compiler's name and version.

    Raises:
        InputError: CMake fails, such as for a compiler that does not work; the message names the log.
    """
    compiler = "unknown"

    def look(line: str) -> None:
        nonlocal compiler
        if match := _COMPILER.match(line):
            compiler = match[1]

    places = ["-S", str(tree), "-B", str(build), "-G", tools.generator, f"-DCMAKE_MAKE_PROGRAM={tools.make}"]
    cuda = [f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"] if tools.nvcc else []
    if run_logged([tools.cmake, *places, *cuda, *options], log, on_line=look) != 0:
        raise InputError(f"llama.cpp cannot be configured: {reason(log)}; everything CMake said is in {log}")
    return compiler


def compile_targets(
    build: Path, tools: BuildTools, targets: tuple[str, ...], jobs: int, log: Path, progress: Progress
) -> None:
    """Compile `targets`, `jobs` files at a time.

    Raises:
        InputError: the compiler fails; the message names the log.
    """
    command = [tools.cmake, "--build", str(build), "--parallel", str(jobs), "--target", *targets]
    with progress.step("compiling llama.cpp, percent", 100) as advance:
        shown = 0

        def count(line: str) -> None:
            nonlocal shown
            percent = percent_done(line)
            if percent is not None and percent > shown:
                advance(percent - shown)
                shown = percent

        environment = {"NINJA_STATUS": "[%f/%t] "}
        if run_logged(command, log, environment=environment, on_line=count) != 0:
            raise InputError(f"llama.cpp cannot be compiled: {reason(log)}; everything the compiler said is in {log}")
        advance(100 - shown)


def percent_done(line: str) -> int | None:
    """Percentage done in a line of Ninja's or make's output."""
    if match := _NINJA_DONE.match(line):
        return 100 * int(match[1]) // max(int(match[2]), 1)
    if match := _MAKE_DONE.match(line):
        return int(match[1])
    return None
