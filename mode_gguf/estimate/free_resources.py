"""Free disk space and memory, and shortages of them for a conversion."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mode_gguf.artifacts import existing_parent, free_bytes
from mode_gguf.estimate.machine import available_memory
from mode_gguf.estimate.stage_estimates import StageEstimate
from mode_gguf.sizes import binary_size, decimal_size
from mode_gguf.workfolder import WorkFolder


@dataclass(frozen=True, slots=True)
class FreeResources:
    """Free bytes.

    Attributes:
        folder: the nearest folder above the work folder that exists.
        disk: on its disk, plus the files of an earlier run in the work folder, which are replaced or reused.
        temporary_folder: TMPDIR.
        temporary: on its disk; None where it is the same disk.
        memory: of the machine.
    """

    folder: Path
    disk: int
    temporary_folder: Path
    temporary: int | None
    memory: int


def free_resources(folder: WorkFolder) -> FreeResources:
    """Free disk space and memory at this moment."""
    place, temporary = existing_parent(folder.path), Path(tempfile.gettempdir())
    same = place.stat().st_dev == temporary.stat().st_dev
    left = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file()) if folder.path.is_dir() else 0
    return FreeResources(
        folder=place,
        disk=free_bytes(place) + left,
        temporary_folder=temporary,
        temporary=None if same else free_bytes(temporary),
        memory=available_memory(),
    )


def disk_use(stages: Sequence[StageEstimate]) -> tuple[int, int]:
    """Most bytes at one time in the work folder, and in TMPDIR."""
    written = most = waiting = 0
    for stage in stages:
        written += stage.written
        waiting += stage.working
        most = max(most, written + waiting)
        if stage.stage == "export":  # it has put into the file what `round` left, which is removed
            waiting = 0
    return most, max((stage.temporary for stage in stages), default=0)


def shortages(stages: Sequence[StageEstimate], free: FreeResources) -> list[str]:
    """Disk space that is missing, one sentence per disk."""
    working, temporary = disk_use(stages)
    found = []
    if free.temporary is None:
        working, temporary = working + temporary, 0
    if working > free.disk:
        found.append(
            f"{free.folder}: about {decimal_size(working)} are needed, {decimal_size(free.disk)} are free; choose "
            "another disk with --out (and TMPDIR), or leave out what is compared with (--no-validate)"
        )
    if free.temporary is not None and temporary > free.temporary:
        found.append(
            f"{free.temporary_folder}: about {decimal_size(temporary)} are needed for hidden states, "
            f"{decimal_size(free.temporary)} are free; name a folder on a larger disk in TMPDIR, or raise "
            "--hidden-memory"
        )
    return found


def memory_warning(stages: Sequence[StageEstimate], free: FreeResources) -> str | None:
    """A warning about the stage that may take more memory than is free; None if none may."""
    largest = max(stages, key=lambda stage: stage.memory)
    if largest.memory <= free.memory:
        return None
    return (
        f"`{largest.stage}` may take {binary_size(largest.memory)} of memory, {binary_size(free.memory)} are "
        "free; lower --hidden-memory, or use fewer samples"
    )
