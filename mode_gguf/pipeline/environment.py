"""The environment: compute device, packers, and llama.cpp runtimes found here."""

import os
from pathlib import Path

from mode_gguf.errors import MissingResourceError
from mode_gguf.llama_cpp.c_api import library_version
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.runtime.installed import HOW_TO_BUILD, find_runtime
from mode_gguf.llama_cpp.runtime.speed import bench
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization import libggml
from mode_gguf.quantization.types import Packer, types_packed_by


def environment(llama_cpp: Path | None = None) -> dict[str, object]:
    """The environment by name: torch's device, the packer of every type, and every llama.cpp found."""
    from mode_gguf.forward.streaming import choose_device

    tools = find_llama_cpp(llama_cpp)
    runtime = find_runtime()
    return {
        "device": str(choose_device("auto")),
        "cores": os.cpu_count(),
        **{f"packed by {packer}": ", ".join(types_packed_by(packer)) for packer in Packer},
        "libggml": libggml.status(),
        "embedded llama.cpp": library_version(),
        "type per expert": f"{runtime.version} in {runtime.bin}" if runtime else f"no runtime; {HOW_TO_BUILD}",
        "llama.cpp": tools.version or ("of unknown version" if tools.programs else "none found"),
        **{name: str(path) for name, path in tools.programs.items()},
    }


def runtime_speed(progress: Progress = silent) -> dict[str, str]:
    """Speed of a type per expert on this machine, as text, by the way of computing.

    Raises:
        MissingResourceError: our own build is not there, or cannot measure.
    """
    runtime = find_runtime()
    if runtime is None:
        raise MissingResourceError(f"--bench-runtime measures llama.cpp with expert groups; {HOW_TO_BUILD}")
    speeds = bench(runtime, progress)
    base = speeds["one type"]
    found = {}
    for way, speed in speeds.items():
        ratio = f" ({speed.prompt / base.prompt:.2f} and {speed.generation / base.generation:.2f} of one type's)"
        numbers = f"{speed.prompt:.0f} tokens of a prompt and {speed.generation:.0f} of an answer per second"
        found["speed, " + way] = numbers + (ratio if speed is not base else "")
    return found
