"""The text model and projector of a folder, for serving."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguf import LlamaFileType

from mode_gguf.allocation.plan import Plan
from mode_gguf.errors import InputError
from mode_gguf.gguf.header import read_header
from mode_gguf.gguf.shards import earlier_shards, is_later_shard
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.pipeline.followed_plan import followed_plan
from mode_gguf.pipeline.stages.export import model_path
from mode_gguf.workfolder import WorkFolder

_FULL_PRECISION: Final = (LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16)
_NO_MODELS: Final = ("mmproj", "imatrix")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A text model and its projector, if there is one.

    Attributes:
        plan: that the model was made by, if it was this folder's.
        notes: choices among several files, as text.
    """

    model: Path
    mmproj: Path | None
    plan: Plan | None = None
    notes: tuple[str, ...] = ()

    @property
    def fit(self) -> FitSettings | None:
        """The settings that memory was planned for."""
        return self.plan.budget.fit if self.plan and self.plan.budget else None


def find_model_files(folder: Path) -> ModelFiles:
    """The pair in a work folder, or in any folder with GGUF files: the model of plan.json, else the newest.

    Full-precision files, which a work folder keeps to compare with, are taken only where there is nothing else.

    Raises:
        InputError: no model is there.
    """
    files = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime, reverse=True)
    texts = [path for path in files if not path.name.startswith(_NO_MODELS) and not is_later_shard(path)]
    if not texts:
        raise InputError(f"{folder}: holds no GGUF model; make one with `mode-gguf convert`, or name another folder")
    unnamed = WorkFolder(folder, "")
    plan = followed_plan(unnamed) if unnamed.plan.exists() else None
    planned = _planned(folder, plan) if plan else None
    model = planned if planned in texts else sorted(texts, key=_is_full_precision)[0]
    assert model is not None
    notes = []
    if len(texts) > 1:
        why = "the one of plan.json" if model == planned else "the newest"
        notes.append(f"of {len(texts)} models in {folder}, {why} is taken: {model.name}")
    projectors = [path for path in files if path.name.startswith("mmproj-")]
    mmproj = _projector(projectors, plan) if projectors else None
    if mmproj is None:
        notes.append(f"{folder} holds no projector (mmproj-*.gguf): there will be no pictures")
    elif len(projectors) > 1:
        notes.append(f"of {len(projectors)} projectors {mmproj.name} is taken")
    return ModelFiles(model, mmproj, plan if model == planned else None, tuple(notes))


def _planned(folder: Path, plan: Plan) -> Path:
    path = model_path(WorkFolder(folder, plan.made_from.model), plan)
    return path if path.exists() else next(iter(earlier_shards(path)), path)


def _is_full_precision(path: Path) -> bool:
    return read_header(path).metadata.get("general.file_type") in _FULL_PRECISION


def _projector(newest_first: list[Path], plan: Plan | None) -> Path:
    """The one that memory was planned for, else the newest."""
    fit = plan.budget.fit if plan and plan.budget else None
    wanted = f"-{fit.projector_type}.gguf" if fit else ""
    return next((path for path in newest_first if os.fspath(path).endswith(wanted)), newest_first[0])
