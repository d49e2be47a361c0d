"""Rendering of chat templates in a process of their own, which is ended when it takes too long."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from mode_gguf.errors import InputError, reason

COMPUTE_SECONDS = 5.0
"""A template may compute for so long; none that is in use takes a tenth of a second."""
WAIT_SECONDS = 30.0
"""How long its process may take on a busy machine, its start included."""
MEMORY_BYTES = 2**29
"""What its process may have in memory, Python included."""
MOST_CHARACTERS = 2**20
"""Of a template, and of what it may write besides four times what it is given."""

_PROGRAM = Path(__file__).with_name("worker.py")


class TemplateError(InputError):
    """A chat template that cannot be rendered; the message is the reason alone, in one line.

    Attributes:
        over_limit: whether it is the limit of time, memory or size that it met.
    """

    def __init__(self, message: str, *, over_limit: bool = False) -> None:
        super().__init__(message)
        self.over_limit = over_limit


def render(source: str, variables: Mapping[str, Any]) -> str:
    """What a chat template, in Jinja, makes of `variables`, as transformers' tokenizers render it.

    Raises:
        TemplateError: it is broken, refuses the messages, or takes more time or memory than any does that is in use.
    """
    if len(source) > MOST_CHARACTERS:
        raise TemplateError(f"it has {len(source):,} characters, {MOST_CHARACTERS:,} are read", over_limit=True)
    given = json.dumps({"template": source, "variables": variables})
    most = MOST_CHARACTERS + 4 * len(given)
    found = _WORKER.answer(f'{{"most": {most}, {given[1:]}')
    if found is None:
        raise TemplateError(
            f"it takes more than {COMPUTE_SECONDS:.0f} seconds or {MEMORY_BYTES >> 20} MiB of memory", over_limit=True
        )
    if "text" in found:
        return found["text"]
    said = reason(ValueError(found["error"])) if found["error"] else found["kind"]
    kind = "" if found["kind"] in ("Limit", "TemplateError") else f"{found['kind']}: "
    raise TemplateError(f"{kind}{said}".removeprefix("ValueError: "), over_limit=found["kind"] == "Limit")


class _Worker:
    """The process, started when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def answer(self, request: str) -> dict[str, str] | None:
        """Its answer to a line of JSON; None if it has ended without one."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            limit = Timer(WAIT_SECONDS, process.kill)
            limit.start()
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:  # it has ended before it had read all
                line = ""
            finally:
                limit.cancel()
            if not line.endswith("\n"):
                self._end()
                return None
            found: dict[str, str] = json.loads(line)
            return found

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._end()
            kept = ("PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")  # no keys and tokens: what runs there is a stranger's
            environment = {name: os.environ[name] for name in kept if name in os.environ}
            environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", *map(str, (_PROGRAM, COMPUTE_SECONDS, MEMORY_BYTES))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                    env=environment,
                )
            except OSError as error:
                raise TemplateError(f"no process can be started for it: {reason(error)}") from error
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # of what could not be written any more
                    pipe.close()


_WORKER = _Worker()
atexit.register(_WORKER.close)
