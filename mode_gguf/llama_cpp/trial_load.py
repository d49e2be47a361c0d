"""Trial load: llama.cpp opens files whose weights are not there, in a process of its own, and allocates nothing.

It reads every key, builds the vocabulary, compares all shapes with the hyperparameters and lays out its graphs, so that
it says in a second what it would say of the finished file. Where it stops the process instead, the parent lives on.

`python -m mode_gguf.llama_cpp.trial_load MODEL [MMPROJ]` is that process; it ends with 0, or with 1 and the reason.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from mode_gguf.errors import MissingResourceError, ModeGgufError
from mode_gguf.llama_cpp import c_api

_SECONDS: Final = 300
_CONTEXT: Final = 64
_READ_NOTHING: Final = 0
"""`enum llama_load_mode`: neither mapped nor read ahead."""
_REFUSED: Final = 1


def refusal(model: Path, mmproj: Path | None = None) -> str | None:
    """Reason for which llama.cpp opens a text model or its projector not; None where it opens both.

    Raises:
        MissingResourceError: llama.cpp cannot be used at all.
    """
    command = [sys.executable, "-m", __name__, str(model), *([str(mmproj)] if mmproj else [])]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            # A debugger that prints where it was would take seconds.
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        return f"it had not opened them after {_SECONDS} seconds"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == MissingResourceError.exit_code:
        raise MissingResourceError(lines[-1] if lines else "llama.cpp cannot be used")
    if done.returncode == _REFUSED:
        return lines[-1] if lines else "no reason given"
    stopped = next((line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line), *lines[-1:] or ("",))
    return f"it stopped: {stopped or f'signal {-done.returncode}'}"


def main(model: str, mmproj: str | None = None) -> None:
    """Open both, and end the process."""
    try:
        lib = c_api.library()
    except ModeGgufError as error:
        print(error, file=sys.stderr)
        sys.exit(MissingResourceError.exit_code)
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.use_extra_bufts, params.load_mode = 0, True, False, _READ_NOTHING
    loaded = lib.llama_model_load_from_file(os.fsencode(model), params)
    _require(loaded)
    context = lib.llama_context_default_params()
    context.n_ctx = context.n_batch = context.n_ubatch = _CONTEXT
    _require(lib.llama_init_from_model(loaded, context))
    if mmproj is not None:
        vision = lib.mtmd_context_params_default()
        vision.use_gpu, vision.print_timings, vision.warmup = False, False, False
        _require(lib.mtmd_init_from_file(os.fsencode(mmproj), loaded, vision))


def _require(handle: int | None) -> None:
    if not handle:
        print(c_api.last_errors(), file=sys.stderr)
        sys.exit(_REFUSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
