"""Builds llama.cpp, with our patch or as it was released, into the user's cache folder: whole or not at all."""

import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from mode_gguf.artifacts import write_json
from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.runtime.cmake import compile_targets, configure, find_tools, options_of
from mode_gguf.llama_cpp.runtime.installed import RECORD, BuildRecord, Runtime, cache_folder
from mode_gguf.llama_cpp.runtime.pinned_release import BuildVariant
from mode_gguf.llama_cpp.runtime.source import apply_patch, check_source, copy_source, download_source
from mode_gguf.progress import Progress, silent

_SCRATCH: Final = ".building-"
_A_DAY: Final = 24 * 3600


def build_runtime(
    variant: BuildVariant, source: Path | None = None, *, jobs: int | None = None, progress: Progress = silent
) -> Runtime:
    """Build `variant` and put it in the cache, in the place of an earlier build of it.

    Args:
        source: a checkout of the release, which is only read; by default the source comes from the package index.
        jobs: files compiled at a time; by default as many as there are cores.

    Raises:
        MissingResourceError: a program that builds is missing, or the source cannot be fetched.
        InputError: the source is another one, the patch does not apply, or compiling fails. The message names the log,
            which is kept then; the cache is as before.
    """
    tools = find_tools(cuda=variant.backend == "cuda")
    if source:
        check_source(source, variant.release)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    log = cache / f"{variant.name}.log"
    log.unlink(missing_ok=True)
    # In the cache itself, so that what is finished can be renamed into its place.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=cache, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        tree, build, staged = scratch / "source", scratch / "build", scratch / "installed"
        with progress.step("llama.cpp's source", 1) as advance:
            if source:
                copy_source(source, variant.release, tree)
            else:
                download_source(variant.release, scratch, tree, log)
            if variant.patch:
                apply_patch(tree, variant.patch, log)
            advance(1)
        options = options_of(variant)
        compiler = configure(tree, build, tools, options, log)
        compile_targets(build, tools, variant.release.targets, jobs or os.cpu_count() or 1, log, progress)
        _collect(build / "bin", staged / "bin", variant.release.targets)
        record = BuildRecord(
            llama_cpp=variant.release.name,
            patch=variant.patch_digest,
            backend=variant.backend,
            options=options,
            compiler=compiler,
            built=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_json(staged / RECORD, record.model_dump(mode="json"))
        folder = cache / variant.name
        if folder.exists():
            folder.rename(scratch / "earlier")
        staged.rename(folder)
    log.unlink(missing_ok=True)
    return Runtime(folder, record)


def _remove_leftovers(cache: Path) -> None:
    """Remove scratch folders of builds that were killed; one younger than a day may still be at work."""
    for path in cache.glob(f"{_SCRATCH}*"):
        if time.time() - path.stat().st_mtime > _A_DAY:
            shutil.rmtree(path, ignore_errors=True)


def _collect(built: Path, to: Path, targets: tuple[str, ...]) -> None:
    """Copy programs and shared libraries, links as links.

    Raises:
        InputError: CMake built without error, yet a target is not there.
    """
    names = {path.name for path in built.iterdir()} if built.is_dir() else set()
    for target in targets:
        if not names & {target, f"lib{target}.so", f"lib{target}.dylib"}:
            raise InputError(f"{built}: {target} is missing after a build without errors; build from another --source")
    shutil.copytree(built, to, symlinks=True)
