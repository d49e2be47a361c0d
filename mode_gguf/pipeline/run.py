"""A run of stages: one checkpoint and one work folder; and the base class of stages."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mode_gguf.artifacts import SCHEMAS
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.identity import GENERAL, SideFiles, side_files
from mode_gguf.pipeline.stage_cache import StageCache, StageState
from mode_gguf.progress import Progress, silent
from mode_gguf.workfolder import WorkFolder


@dataclass(frozen=True, slots=True)
class Run:
    """A checkpoint, the folder of everything written about it, and how long each stage took.

    `seconds` has 0 for a stage that was reused. `known` has what keys take long to find out.
    """

    checkpoint: Checkpoint
    folder: WorkFolder
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    known: dict[object, Any] = field(default_factory=dict)

    @property
    def cache(self) -> StageCache:
        return StageCache(self.folder, self.progress)

    def identify(self) -> None:
        """Read the weights for the model's fingerprint, unless a run in this folder has, and they are as they were.

        Raises:
            InputError: a file of the weights cannot be read.
        """
        self.checkpoint.identity.fingerprint(self.progress)

    def ensure(self, *stages: "Stage") -> None:
        """Execute each stage unless what it left is still right."""
        self.identify()
        for stage in stages:
            self.seconds[stage.name] = 0.0
            if not stage.is_current(self):
                stage.execute(self)

    @contextmanager
    def recorded(self, stage: "Stage") -> Iterator[None]:
        """The part of a stage that writes, see `StageCache.recorded`; its time is noted."""
        with self.cache.recorded(stage.state(self)):
            yield
        self.seconds[stage.name] = self.cache.seconds(stage.name)


class Stage(ABC):
    """One step of a conversion; made from its options, it reads and writes files of the run's folder."""

    name: ClassVar[str]
    """Key of the stage in stages.json."""

    @abstractmethod
    def key(self, run: Run) -> dict[str, Any]:
        """All that the outputs depend on, by names that people read; values that JSON can hold."""

    @abstractmethod
    def outputs(self, run: Run) -> tuple[Path, ...]:
        """The files it writes."""

    @abstractmethod
    def execute(self, run: Run) -> None:
        """Execute the stage, writing within `run.recorded`."""

    def state(self, run: Run) -> StageState:
        """The state that stages.json keeps."""
        return StageState(self.name, self.key(run), self.outputs(run))

    def is_current(self, run: Run) -> bool:
        """Whether the outputs are current, so that the stage need not be executed."""
        return run.cache.is_current(self.state(run))


def base_key(checkpoint: Checkpoint, schema: str) -> dict[str, Any]:
    """Settings that every stage depends on: the model, its base GGUF, and the schema number of the artefact.

    A change of method raises the artefact's number in `SCHEMAS`; the tool's version is not part of it, so that a
    release throws nothing away.
    """
    base = {} if checkpoint.base is None else {"base": [path.name for path in checkpoint.base.files]}
    named = {"model": checkpoint.name, "model fingerprint": checkpoint.fingerprint, **base}
    return {**named, f"{schema} schema": SCHEMAS[schema]}


def general_key(checkpoint: Checkpoint, *kinds: SideFiles) -> dict[str, Any]:
    """Settings of a stage that writes a GGUF file: names of the model, and files beside its weights.

    Of a base GGUF keys are copied, and its content is part of the fingerprint.

    Raises:
        InputError: one of the files cannot be read.
    """
    called = {"called": checkpoint.repository or checkpoint.path.name}
    return called if checkpoint.base is not None else {**called, **side_files(checkpoint.path, GENERAL, *kinds)}
