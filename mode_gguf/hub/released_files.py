"""A release: the files of a work folder that are published, and everything that the model card says of them."""

import hashlib
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mode_gguf.allocation.plan import Plan
from mode_gguf.errors import InputError
from mode_gguf.hub.local_paths import without_local_paths
from mode_gguf.hub.names import is_repository, quant_tag
from mode_gguf.hub.own_files import opened_own
from mode_gguf.progress import Progress
from mode_gguf.validation.report import ValidationReport

log = logging.getLogger(__name__)

FileRole = Literal["text model", "projector", "importance matrix"]

_CHUNK = 2**24
_LOGGED = re.compile(r"\S+ \S+ INFO +(?P<message>.*)")
_COMMAND = re.compile(r"mode-gguf \S+: (?P<line>.*)")
_STAGES = ("convert", "calibrate", "sensitivity", "unit-kl", "plan", "round", "export", "merge")


@dataclass(frozen=True, slots=True)
class ReleasedFile:
    """A published GGUF file; `bpw` is None for one without weights."""

    path: Path
    role: FileRole
    size_bytes: int
    bpw: float | None
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelRelease:
    """A finished conversion.

    Attributes:
        files: the text model or its shards, projector and importance matrix.
        model: the text model as `validation.structure.describe` describes it.
        report: the validation of these files; None without one.
        calibration: metadata of calibration.safetensors; empty where nothing was calibrated.
        datasets: names of the sets that the importance matrix comes from.
        commands: commands that made the text model, see `commands_of`.
    """

    files: tuple[ReleasedFile, ...]
    model: Mapping[str, Any]
    plan: Plan
    report: ValidationReport | None
    calibration: Mapping[str, Any]
    datasets: tuple[str, ...]
    commands: tuple[str, ...]

    def of_role(self, role: FileRole) -> list[ReleasedFile]:
        return [file for file in self.files if file.role == role]

    @property
    def first_file(self) -> str:
        """The text model's file that users name."""
        return self.files[0].path.name

    @property
    def tag(self) -> str:
        """TAG in `-hf REPOSITORY:TAG`."""
        return quant_tag(self.first_file) or ""

    @property
    def has_expert_groups(self) -> bool:
        """Whether experts have a type each, which stock llama.cpp cannot load."""
        return "expert_groups.version" in self.model["metadata"]

    @property
    def base_model(self) -> str | None:
        """`owner/name` of the checkpoint on the hub, where anything says so."""
        url = str(self.model["metadata"].get("general.base_model.0.repo_url"))
        named = (self.plan.made_from.repository, url.removeprefix("https://huggingface.co/"))
        return next((name for name in named if name and is_repository(name)), None)


def sha256_of(paths: Sequence[Path], progress: Progress) -> list[str]:
    """Digests of whole files.

    Raises:
        InputError: a file cannot be read, or is a link.
    """
    digests = []
    try:
        with progress.step("hashing", sum(path.stat().st_size for path in paths), "bytes") as advance:
            for path in paths:
                digest = hashlib.sha256()
                with opened_own(path) as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        advance(len(chunk))
                digests.append(digest.hexdigest())
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return digests


def commands_of(log_file: Path, plan: Plan) -> tuple[str, ...]:
    """The commands that a work folder's log says the text model was made by, without where things lay.

    That is the last `convert`, or of the stages one by one the last run of each before the last `export`.
    """
    try:
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    messages = [match["message"] for line in lines if (match := _LOGGED.fullmatch(line))]
    exported = [number for number, message in enumerate(messages) if message.startswith("export: begins")]
    last: dict[str, list[str]] = {}
    for message in messages[: exported[-1]] if exported else ():
        match = _COMMAND.fullmatch(message)
        words = _words(match["line"]) if match else []
        if len(words) > 1 and words[1] in _STAGES:
            last.pop(words[1], None)
            last[words[1]] = words
    if last and next(reversed(last)) == "convert":
        last = {"convert": last["convert"]}
    else:
        last.pop("convert", None)
    return tuple(shlex.join(["mode-gguf", *(_public(word, plan) for word in words[1:])]) for words in last.values())


def _words(line: str) -> list[str]:
    """The words of a command; none where the line is a part of one."""
    try:
        return shlex.split(line)
    except ValueError:
        return []


def _public(word: str, plan: Plan) -> str:
    source = plan.made_from
    if source.repository and source.revision and word.rstrip("/").endswith(f"/snapshots/{source.revision}"):
        return f"{source.repository}@{source.revision}"
    name = without_local_paths(word) if not word.startswith("/") else Path(word).name
    return f"./{name}" if name.startswith("-") and not word.startswith("-") else name
