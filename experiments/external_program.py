"""Programs of other projects, run to their end; their peak memory where it is asked for."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 3000
"""Characters of what a program said last that are shown when it fails."""


def run_program(*command: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program, with its output in the result.

    Args:
        environment: variables beside those of this process.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    parts = [str(part) for part in command]
    done = subprocess.run(
        parts,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{parts[0]} ends with {done.returncode}:\n{(done.stdout + done.stderr).strip()[-SHOWN:]}")
    return done


@dataclass(frozen=True, slots=True)
class WatchedProcess:
    """A process that has ended.

    Attributes:
        seconds: wall time.
        anonymous: most bytes that it filled itself.
        resident: most bytes with mapped files.
        written: bytes that went to the disk.
    """

    seconds: float
    anonymous: int
    resident: int
    written: int


def watched(command: Sequence[str | Path], log: Path) -> WatchedProcess:
    """Run a command with its output in `log`, and sample every few milliseconds what memory it takes.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    anonymous = resident = written = 0
    with log.open("w") as output:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output, env=environment)
        status, io = Path(f"/proc/{process.pid}/status"), Path(f"/proc/{process.pid}/io")
        while process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                counted = dict(line.split(":", 1) for line in io.read_text().splitlines())
            except OSError:
                break
            if "RssAnon" in fields:
                now = int(fields["RssAnon"].split()[0]) * 1024
                anonymous, resident = max(anonymous, now), max(resident, int(fields["VmHWM"].split()[0]) * 1024)
                written = max(written, int(counted["write_bytes"]))
            time.sleep(0.005)
        code = process.wait()
        seconds = time.perf_counter() - started
    if code:
        raise SystemExit(f"{command} ends with {code}: {log.read_text()[-SHOWN:]}")
    return WatchedProcess(seconds, anonymous, resident, written)


def mode_gguf_command(*arguments: str | Path) -> list[str | Path]:
    """The command line of mode-gguf itself, for `watched` or `run_program`."""
    return [sys.executable, "-m", "mode_gguf_cli", *arguments]
