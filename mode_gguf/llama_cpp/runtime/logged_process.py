"""Running long programs: their output goes to a log file, line by line, and nothing of them survives us."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mode_gguf.errors import MissingResourceError


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> int:
    """Run `command` and append it and its output to `log`; its exit code.

    Args:
        folder: where it runs; by default here.
        environment: variables besides ours.
        on_line: is given every line.

    Raises:
        MissingResourceError: it cannot be started.
    """
    with log.open("a", buffering=1, encoding="utf-8", errors="replace") as file:
        file.write(f"$ {' '.join(command)}\n")
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise MissingResourceError(f"{command[0]}: cannot be started ({error.strerror})") from error
        with process:
            try:
                for line in process.stdout or ():
                    file.write(line)
                    on_line(line.rstrip("\n"))
            except BaseException:
                _end_group(process)
                raise
        return process.returncode


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a program and its children: compilers would go on for minutes otherwise."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGCONT)  # should it be stopped, it would not end before it goes on
    else:
        process.terminate()


def reason(log: Path) -> str:
    """The line of `log` that most likely says what went wrong: its first error after the last command, else its end."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n$ ")[-1].splitlines()[1:]
    lines = [line.strip() for line in lines if line.strip()]
    for number, line in enumerate(lines):
        if "error:" in line.lower() or "CMake Error" in line:
            return " ".join(lines[number : number + 2]) if line.endswith(":") else line
    return lines[-1] if lines else "no message"
