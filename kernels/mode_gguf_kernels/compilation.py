"""Compilation with Numba: without the GIL, without fast-math, cached on disk under a name no edit can leave stale.

Numba notices an edit of the file a cached function stands in, but not of a helper in another file. So the cache
folder's name carries a digest of every source of this package, of the versions of Numba and llvmlite, of the number
of SIMD lanes, and of whether accesses are checked (NUMBA_BOUNDSCHECK). Numba itself tells processors apart.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import llvmlite
import numba
from numba.core import config

from mode_gguf_kernels.simd import LANES

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PACKAGE = Path(__file__).parent


def sources_digest(package: Path = _PACKAGE) -> str:
    """16 hexadecimal digits that change with any source of the package and with the compiler."""
    build = f"{numba.__version__} {llvmlite.__version__} {LANES} {bool(config.BOUNDSCHECK)}"
    digest = hashlib.sha256(build.encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def user_cache_folder() -> Path:
    """The platform's folder for a user's caches."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache_folder(candidates: Iterable[Path], digest: str) -> Path | None:
    """The first candidate's `mode_gguf_kernels-<digest>` that can be written to; None where there is none."""
    for candidate in candidates:
        folder = candidate / f"mode_gguf_kernels-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


def _candidates() -> list[Path]:
    """NUMBA_CACHE_DIR where a user set it, beside the sources, in the user's cache."""
    chosen = [Path(config.CACHE_DIR)] if config.CACHE_DIR else []
    return [*chosen, _PACKAGE / "__pycache__", user_cache_folder()]


_CACHE_FOLDER = cache_folder(_candidates(), sources_digest())


def kernel(function: _Function) -> _Function:
    """Compile `function` on its first call, as an entry point called from Python; it runs without the GIL.

    Numba fixes a function's cache when it is decorated, from its NUMBA_CACHE_DIR setting: that is set to our folder
    for just as long, so that nobody else's functions are affected.
    """
    users_setting = config.CACHE_DIR
    try:
        config.CACHE_DIR = "" if _CACHE_FOLDER is None else str(_CACHE_FOLDER)
        options = {"nogil": True, "error_model": "numpy", "cache": _CACHE_FOLDER is not None}
        return cast(_Function, numba.njit(**options)(function))
    finally:
        config.CACHE_DIR = users_setting


def kernel_of(template: Callable[..., Any], name: str, constants: Mapping[str, Any]) -> Any:
    """`kernel` of a copy of `template` that is called `name` and for which the globals in `constants` are these.

    A closure would say the same in plain Python, but Numba looks a closure up in its cache by the pickled contents of
    its cells, and a device function pickles differently in every process: nothing would ever be found again. A
    function's globals are not part of the look-up, its qualified name is part of the cache's file names; so every copy
    needs a name of its own, and `sources_digest` has to notice whatever changes its constants.
    """
    code = cast(FunctionType, template).__code__
    copy = FunctionType(code, {**cast(FunctionType, template).__globals__, **constants}, name)
    copy.__qualname__ = name
    return kernel(copy)


def device(function: _Function) -> _Function:
    """Compile `function` into the kernels that call it."""
    return cast(_Function, numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))
