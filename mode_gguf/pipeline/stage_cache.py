"""stages.json: the cache of stages, by settings and outputs."""

import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mode_gguf import __version__
from mode_gguf.artifacts import write_json
from mode_gguf.errors import UsageError
from mode_gguf.file_digests import digests_of
from mode_gguf.progress import Progress, silent
from mode_gguf.workfolder import JOURNAL, WorkFolder

VERSIONED_PACKAGES = ("gguf", "numba", "numpy", "torch", "transformers", "xllamacpp")
"""Packages whose versions may change results."""

journal = logging.getLogger(JOURNAL)


@dataclass(frozen=True, slots=True)
class StageState:
    """A stage as it is asked for.

    Attributes:
        name: of its command.
        settings: all that its outputs depend on, by names that people read; values that JSON can hold.
        outputs: the files it writes.
    """

    name: str
    settings: Mapping[str, Any]
    outputs: tuple[Path, ...]


class StageCache:
    """The cache of a work folder's stages: settings, identities of outputs and duration of each stage's last run.

    A stage that has begun and not finished is not remembered: whatever it may have left of its outputs is made again.
    """

    def __init__(self, folder: WorkFolder, progress: Progress = silent) -> None:
        self._folder = folder
        self._progress = progress

    @contextmanager
    def recorded(self, stage: StageState) -> Iterator[None]:
        """Context in which a stage writes: what is known of its outputs is forgotten, and noted anew at the end."""
        self.forget(stage.name)
        journal.info("%s: begins with %s", stage.name, json.dumps(_as_json(stage.settings)))
        started = time.monotonic()
        yield
        seconds = max(0.001, round(time.monotonic() - started, 3))
        self.record(stage, seconds)
        journal.info("%s: done in %.1f s", stage.name, seconds)

    def is_current(self, stage: StageState) -> bool:
        """Whether all outputs are there, unchanged and made with just these settings."""
        return self.has_settings(stage) and self._entry(stage.name)["outputs"] == self._identities(stage.outputs)

    def has_settings(self, stage: StageState) -> bool:
        """Whether the stage last ran with these settings, whatever became of its outputs."""
        return self._entry(stage.name).get("settings") == _as_json(stage.settings)

    def edited(self, stage: StageState) -> list[Path]:
        """Outputs that are there, and are not what the stage left."""
        left = self._entry(stage.name).get("outputs", {})
        now = self._identities(stage.outputs)
        names = {self._name(path): path for path in stage.outputs}
        return [path for name, path in names.items() if now[name] and left.get(name) not in (None, now[name])]

    def last_run(self, stage: str) -> tuple[Mapping[str, Any], Mapping[Path, str]]:
        """Settings of a stage's last run, and its outputs as they were (`file_identity`); empty if unfinished.

        Raises:
            InputError: stages.json, which may come from a stranger, names an output outside the folder.
        """
        entry = self._entry(stage)
        outputs = {self._folder.file(name): str(found) for name, found in entry.get("outputs", {}).items()}
        return entry.get("settings", {}), outputs

    def finished(self, stage: str) -> str:
        """When the stage's last run ended, as ISO 8601 text in UTC, to the second; empty if that is not known."""
        return str(self._entry(stage).get("finished", ""))

    def seconds(self, stage: str) -> float:
        """Duration of the stage's last run."""
        return float(self._entry(stage).get("seconds", 0.0))

    def entries(self) -> dict[str, dict[str, Any]]:
        """All entries, by stage."""
        return {stage: entry for stage in self._read() if (entry := self._entry(stage))}

    def update_output(self, stage: str, path: Path, before: str) -> None:
        """One of a stage's outputs, whose identity was `before`, has been rewritten to hold more than it did."""
        entries = self._read()
        outputs = self._entry(stage).get("outputs", {})
        if outputs.get(self._name(path)) == before:
            entries[stage]["outputs"][self._name(path)] = self.identity(path)
            write_json(self._folder.stages, entries)

    def check_unchanged(self, stages: Sequence[StageState]) -> None:
        """Refuse to throw away what took long to measure.

        Raises:
            UsageError: one of the stages ran with other settings, or one of its outputs was edited; says which.
        """
        for stage in stages:
            entry = self._entry(stage.name)
            before, now = entry.get("settings", {}), _as_json(stage.settings)
            changes = [
                f"{name}: {_shown(before.get(name))} then, {_shown(now.get(name))} now"
                for name in dict.fromkeys([*before, *now])
                if before.get(name) != now.get(name)
            ]
            if entry and changes:
                raise UsageError(
                    f"{self._folder.path}: `{stage.name}` was run here with other settings ({'; '.join(changes)}); "
                    "give those it had, --restart to run it and what depends on it again, or another --out"
                )
            for path in self.edited(stage):
                raise UsageError(
                    f"{path}: is not what `{stage.name}` wrote; remove it or give --restart to have it made again, or "
                    "use it with the commands of single stages"
                )

    def identity(self, path: Path) -> str:
        """`file_identity` of a file, whose digest the folder keeps."""
        return file_identity(path, self._folder.digests, self._progress)

    def forget(self, stage: str) -> None:
        """Count the stage as never run."""
        entries = self._read()
        if entries.pop(stage, None):
            write_json(self._folder.stages, entries)

    def record(self, stage: StageState, seconds: float) -> None:
        """Remember a stage whose outputs are there."""
        entry = {
            "settings": _as_json(stage.settings),
            "outputs": self._identities(stage.outputs),
            "seconds": seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": current_command(),
            "directory": str(Path.cwd()),
            "versions": package_versions(),
        }
        write_json(self._folder.stages, {**self._read(), stage.name: entry})

    def _entry(self, stage: str) -> dict[str, Any]:
        """The entry of a stage; empty if there is none, or none that can be trusted."""
        entry = self._read().get(stage)
        fits = isinstance(entry, dict) and all(isinstance(entry.get(key), dict) for key in ("settings", "outputs"))
        return entry if fits and entry else {}

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._folder.stages.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # No stages.json, or one that cannot be trusted: every stage runs.
        return entries if isinstance(entries, dict) else {}

    def _identities(self, paths: Sequence[Path]) -> dict[str, str]:
        return {self._name(path): self.identity(path) for path in paths}

    def _name(self, path: Path) -> str:
        """Path relative to the folder, so that it may be moved."""
        return str(path.relative_to(self._folder.path)) if path.is_relative_to(self._folder.path) else str(path)


def current_command() -> str:
    """The command line of this process as it was typed, without the program's folder."""
    program = Path(sys.argv[0]).name
    return shlex.join(["mode-gguf" if program == "__main__.py" else program, *sys.argv[1:]])


@lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that compute."""
    found = {"mode-gguf": __version__, "Python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def file_identity(path: Path, kept: Path | None = None, progress: Progress = silent) -> str:
    """Size and digest of a file's content, which `kept` keeps (see `digests_of`); empty if it is not there."""
    if not path.is_file():
        return ""
    (digest,) = digests_of([path], kept, progress)
    return f"{path.stat().st_size} bytes, {digest[:16]}"


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON."""
    restored: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return restored


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
