"""Builds of llama.cpp that `runtime build` left in the user's cache folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mode_gguf.artifacts import Record, read_record
from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.runtime.pinned_release import PATCH, Backend, BuildVariant

RECORD: Final = "build.json"
HOW_TO_BUILD: Final = "build it with: mode-gguf runtime build"
_PREFERRED: Final[tuple[Backend, ...]] = ("cuda", "cpu")


class BuildRecord(Record):
    """`build.json`: release, options, compiler and time (ISO 8601) of a build; `patch` is the digest's beginning."""

    llama_cpp: str
    patch: str | None
    backend: Backend
    options: tuple[str, ...]
    compiler: str
    built: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """A finished build; `bin` holds its programs beside the shared libraries they need, and can be moved."""

    folder: Path
    record: BuildRecord

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def version(self) -> str:
        """Version text of the build, as in reports; changes with the patch."""
        record = self.record
        patched = f"with expert groups (patch {record.patch}, {record.backend})" if record.patch else record.backend
        return f"llama.cpp {record.llama_cpp} {patched}"


def cache_folder() -> Path:
    """The folder of all builds: below XDG_CACHE_HOME, which counts only as an absolute path, else below ~/.cache."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "mode-gguf" / "runtime"


def installed(variant: BuildVariant) -> Runtime | None:
    """The build of `variant`, if there is one; a folder without a readable record is none."""
    folder = cache_folder() / variant.name
    try:
        return Runtime(folder, read_record(folder / RECORD, BuildRecord, "record of a build"))
    except InputError:
        return None


def find_runtime(*, stock: bool = False) -> Runtime | None:
    """The build with this version's patch, or the one without any (`stock`); the one with CUDA if there are both."""
    variants = (BuildVariant(None if stock else PATCH, backend) for backend in _PREFERRED)
    return next(filter(None, map(installed, variants)), None)
