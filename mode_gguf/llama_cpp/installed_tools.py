"""Discovery of the user's llama.cpp programs, and the smoke test in them or in the embedded build."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp.c_api import library_version
from mode_gguf.llama_cpp_library import SUBFOLDERS, named_folder

TOOLS: Final = ("llama-server", "llama-mtmd-cli", "llama-quantize", "llama-perplexity", "llama-bench")
SMOKE_QUESTION: Final = "Describe this picture in one sentence."
_VERSION = re.compile(r"version: (.+)")
_VERSION_SECONDS: Final = 20
_WITHOUT_VERSION: Final = ("llama-quantize", "llama-bench")


@dataclass(frozen=True, slots=True)
class LlamaCppTools:
    """The user's llama.cpp programs that were found, by name, and the version they report."""

    programs: dict[str, Path]
    version: str | None

    def __getitem__(self, name: str) -> Path | None:
        return self.programs.get(name)


@dataclass(frozen=True, slots=True)
class SmokeTest:
    """Result of a smoke test: the answer to a question about an image in `runtime`."""

    runtime: str
    question: str
    answer: str
    seconds: float


def find_llama_cpp(folder: Path | None = None) -> LlamaCppTools:
    """Look for llama.cpp's programs in `folder`, else in the folder that MODE_GGUF_LLAMA_CPP names, else on the PATH.

    A folder may be an installation, a build tree or its `bin`.

    Raises:
        InputError: a folder was named, and none of the programs is in it.
    """
    named = folder or named_folder()
    search = os.pathsep.join(str(named / sub) for sub in SUBFOLDERS) if named else None
    found = {name: Path(path) for name in TOOLS if (path := shutil.which(name, path=search))}
    if named and not found:
        raise InputError(f"{named}: holds none of {', '.join(TOOLS)}; name the folder that llama.cpp was built into")
    return LlamaCppTools(found, _version(found))


def smoke_test(
    candidate: Path,
    mmproj: Path,
    image: Path,
    tools: LlamaCppTools,
    *,
    threads: int | None = None,
    timeout_seconds: float = 900,
) -> SmokeTest:
    """Ask about one image in the user's `llama-mtmd-cli`; without one, in the embedded build.

    Both run in a process of their own, because llama.cpp ends the process it runs in where a file breaks its
    assumptions.

    Raises:
        ValidationError: the program fails, answers nothing, or takes longer than `timeout_seconds`.
    """
    program = tools["llama-mtmd-cli"]
    options = ["--threads", str(threads)] if threads else []
    if program:
        runtime = f"{program} ({tools.version or 'unknown version'})"
        command = [
            *(str(program), "-m", str(candidate), "--mmproj", str(mmproj), "--image", str(image)),
            *("-p", SMOKE_QUESTION, "-n", "48", "--temp", "0", *options),
        ]
    else:
        runtime = library_version()
        # A path may begin with a dash.
        arguments = [*options, "--", str(candidate), str(mmproj), str(image), SMOKE_QUESTION]
        command = [sys.executable, "-m", "mode_gguf.llama_cpp.ask", *arguments]
    started = time.monotonic()
    failed = f"{candidate} with {mmproj} does not work in {runtime}"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_seconds,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    except subprocess.TimeoutExpired:
        raise ValidationError(f"{failed}: no answer within {timeout_seconds:.0f} seconds") from None
    except OSError as error:
        raise ValidationError(f"{failed}: it cannot be started ({error})") from error
    if done.returncode != 0:
        raise ValidationError(f"{failed}: exit code {done.returncode}: {_last_lines(done.stderr)}")
    answer = done.stdout.decode("utf-8", "replace").strip()
    if not answer:
        raise ValidationError(f"{failed}: it answered nothing")
    return SmokeTest(runtime, SMOKE_QUESTION, answer, round(time.monotonic() - started, 2))


def _version(programs: dict[str, Path]) -> str | None:
    """Output of `--version`, of the first program that knows the option."""
    for name, path in programs.items():
        if name in _WITHOUT_VERSION:
            continue
        try:
            done = subprocess.run(
                [str(path), "--version"],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_VERSION_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue  # a program that does not even start has no version; using it will say why
        found = _VERSION.search((done.stdout + done.stderr).decode("utf-8", "replace"))
        if found:
            return found[1].strip()
    return None


def _last_lines(stderr: bytes) -> str:
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "no message"
