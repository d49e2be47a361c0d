"""llama-server on a model and its projector: the user's, our build's, or the embedded one, in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.gguf.header import read_header
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.llama_cpp.c_api import library_version
from mode_gguf.llama_cpp.command_line import command_line
from mode_gguf.llama_cpp.engines import has_expert_groups
from mode_gguf.llama_cpp.server_client import is_healthy
from mode_gguf.options import ServingOptions
from mode_gguf.plain_text import shell_line
from mode_gguf.vocabulary import KvType

DEFAULT_CONTEXT: Final = 16384
"""Tokens; as many as a model was trained for, 262,144, would take gigabytes of KV cache."""
_POLL_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 10
_KEPT_LINES: Final = 8
"""Number of the last output lines of a server that are kept for error messages."""
_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a llama-server.

    Attributes:
        context: tokens of all parallel sequences together.
        kv_type: of the cache; one that is quantized needs flash attention.
        planned: whether memory was planned for: then all of the model goes to the GPU and nothing is adjusted.
        image_tokens: of the largest picture; None for llama.cpp's limit.
    """

    model: Path
    mmproj: Path | None
    host: str
    port: int
    context: int
    parallel: int = 1
    kv_type: KvType = "f16"
    planned: bool = False
    image_tokens: int | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{_ANYWHERE.get(self.host, host)}:{self.port}"

    @property
    def options(self) -> list[str]:
        """llama-server's command-line options, model and projector aside."""
        options = ["--host", self.host, "--port", str(self.port), "--jinja"]
        options += ["--ctx-size", str(self.context), "--parallel", str(self.parallel)]
        if self.kv_type != "f16":
            options += ["--cache-type-k", self.kv_type, "--cache-type-v", self.kv_type]
        if self.planned or self.kv_type != "f16":
            options += ["--flash-attn", "on"]
        if self.planned:
            options += ["--gpu-layers", "all", "--fit", "off"]
        if self.image_tokens is not None:
            options += ["--image-max-tokens", str(self.image_tokens)]
        return options


def server_settings(
    model: Path,
    mmproj: Path | None,
    fit: FitSettings | None,
    options: ServingOptions,
    extra: Sequence[str] = (),
) -> ServerSettings:
    """Server settings from the fit that memory was planned for, or defaults.

    Args:
        fit: settings that memory was planned for.
        options: address and context, where it is other than planned.
        extra: further llama-server arguments; a host or a port among them wins.

    Raises:
        InputError: a file is no GGUF file.
        UsageError: a port that is none.
    """
    trained = next((v for k, v in read_header(model).metadata.items() if k.endswith(".context_length")), None)
    default = min(int(trained), DEFAULT_CONTEXT) if trained else DEFAULT_CONTEXT
    context = options.context
    host, port = _extra_value(extra, "--host") or options.host, _extra_value(extra, "--port")
    if port is not None and not port.isdecimal():
        raise UsageError(f"--port {port} is not a port: give a number, such as 8080")
    serving = ServerSettings(model, mmproj, host, options.port if port is None else int(port), context or default)
    if fit is not None:
        serving = replace(
            serving,
            context=context or fit.context,
            parallel=fit.parallel,
            kv_type=fit.kv_type,
            image_tokens=fit.image_tokens,
            planned=context is None or context <= fit.context,
        )
    return replace(serving, port=_bind(host, 0)) if serving.port == 0 else serving


def server_command(serving: ServerSettings, extra: Sequence[str], llama_cpp: Path | None) -> tuple[list[str], str]:
    """Arguments to execute, and the server's name for messages.

    Raises:
        InputError: a file or the folder `llama_cpp` cannot be used.
        UsageError: `extra` for the embedded server, which takes none.
        MissingResourceError: experts have a type each, and our build is missing.
    """
    try:
        line = command_line(serving.model, "llama-server", serving.mmproj, (*serving.options, *extra), llama_cpp)
    except MissingResourceError:
        if has_expert_groups(read_header(serving.model).metadata):
            raise
        if extra:
            raise UsageError(
                f"{shell_line(extra)} goes to llama-server, and none was found: name the folder of your llama.cpp with "
                "--llama-cpp, or leave it out"
            ) from None
        settings = json.dumps(asdict(serving), default=str)
        return [sys.executable, "-m", "mode_gguf.llama_cpp.embedded_server", settings], f"embedded {library_version()}"
    return line, line[0]


@contextmanager
def running_server(
    command: Sequence[str], serving: ServerSettings, on_line: Callable[[str], None] = lambda line: None
) -> Iterator["ServerProcess"]:
    """Start a server, wait until it answers, and stop it in the end, however that comes.

    Args:
        on_line: is given every line that it prints.

    Raises:
        MissingResourceError: the port is in use, or the program cannot be started.
        InputError: it ended before it answered; with its last lines.
    """
    _check_free(serving)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    except OSError as error:
        raise MissingResourceError(f"{command[0]}: cannot be started ({error.strerror})") from error
    server = ServerProcess(process, serving, on_line)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


class ServerProcess:
    """A server that was started; `running_server` makes it."""

    def __init__(
        self, process: "subprocess.Popen[str]", serving: ServerSettings, on_line: Callable[[str], None]
    ) -> None:
        self.process, self._serving, self._on_line = process, serving, on_line
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Return when /health is ok; raises as `running_server` does."""
        while self.process.poll() is None:
            if is_healthy(self._serving.url):
                return
            time.sleep(_POLL_SECONDS)
        raise self._ended()

    def wait(self) -> None:
        """Return never; raises InputError with its last lines when the server ends by itself."""
        self.process.wait()
        raise self._ended()

    def stop(self) -> None:
        """Ask it to end, and make it end if it does not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(_STOP_SECONDS)
        if self.process.stdout:
            self.process.stdout.close()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.strip():
                self._lines.append(line.strip())
                self._on_line(line.rstrip("\n"))

    def _ended(self) -> InputError:
        self._reader.join(_STOP_SECONDS)
        code = self.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return InputError(f"{self._serving.model}: its server {how}: {_error_lines(list(self._lines))}")


def _error_lines(lines: list[str]) -> str:
    """Lines that name an error, else the last ones."""
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return " / ".join((errors or lines)[-3:]) or "it said nothing"


def _extra_value(extra: Sequence[str], option: str) -> str | None:
    """The value of `option` among llama-server's extra arguments; the last one counts."""
    values = [value for name, value in pairwise(extra) if name == option]
    values += [one.partition("=")[2] for one in extra if one.startswith(f"{option}=")]
    return values[-1] if values else None


def _check_free(serving: ServerSettings) -> None:
    try:
        _bind(serving.host, serving.port)
    except OSError as error:
        raise MissingResourceError(
            f"port {serving.port} on {serving.host} cannot be used ({error.strerror or error}): give another --port"
        ) from error


def _bind(host: str, port: int) -> int:
    """The port number, after binding it for a moment; of port 0 one that is free."""
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])
