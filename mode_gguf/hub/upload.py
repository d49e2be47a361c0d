"""Uploading to the hub: large files first, then one commit that shows all of them at once."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mode_gguf.errors import InputError, UsageError, ValidationError
from mode_gguf.hub.client import hub_api, progress_bars_disabled
from mode_gguf.hub.error_messages import hub_errors
from mode_gguf.hub.names import is_model_file, quant_tag
from mode_gguf.progress import Advance, Progress, silent

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

log = logging.getLogger(__name__)

_MESSAGE = "Upload with mode-gguf"


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to upload by its name on the hub: a local file or its content; `sha256` where it is known."""

    name: str
    content: Path | bytes
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubCommit:
    """The commit of an upload: its address and hash, and whether the repository is private."""

    url: str
    commit: str
    private: bool


def upload_files(
    repository: str, uploads: Sequence[Upload], private: bool | None, progress: Progress = silent
) -> HubCommit:
    """Upload files into a repository, which is made if it is not there; files that it has besides stay.

    What has arrived of an upload that broke off is not sent again. The repository changes in one commit, at the end.

    Args:
        private: whether the repository is; None leaves it as it is, and a new one is private.

    Raises:
        UsageError: the repository is there and is not `private`, or is and should not be.
        InputError: a file is not what was looked at before.
        InputError, MissingResourceError: see `hub.error_messages.hub_errors`.
        ValidationError: the hub has something else than what was sent.
    """
    from huggingface_hub import CommitOperationAdd

    with hub_errors(repository):
        api = hub_api()
        api.whoami()  # without a valid login nothing is begun
        existing = _repository(api, repository, private)
        _warn_of_others(repository, existing, uploads)
        operations = [
            CommitOperationAdd(one.name, _place(one.content) if isinstance(one.content, Path) else one.content)
            for one in uploads
        ]
        pairs = zip(uploads, operations, strict=True)
        large = [(one, operation) for one, operation in pairs if isinstance(one.content, Path)]
        for one, operation in large:
            if operation.upload_info.sha256.hex() != one.sha256:
                raise InputError(f"{one.name}: was changed while it was being published; run the command again")
        with _upload_progress(progress, sum(one.size_bytes for one, _ in large)) as advance:
            for one, operation in large:
                api.preupload_lfs_files(repository, [operation])
                advance(one.size_bytes)
        done = api.create_commit(repository, operations, commit_message=_MESSAGE)
        _check_arrived(api, repository, done.oid, uploads)
        return HubCommit(f"{api.endpoint}/{repository}", done.oid, bool(existing.private))


def _place(path: Path) -> str:
    """The path as the client takes it for what it is: it reads `~` and `..` in its own way."""
    return str(path.parent.resolve() / path.name)


@contextmanager
def _upload_progress(progress: Progress, total: int) -> Iterator[Advance]:
    """Upload progress in bytes, file by file; on a terminal the client's own bars, which move within a file."""
    if progress is not silent and sys.stderr.isatty():
        yield lambda n: None
    else:
        with progress_bars_disabled(), progress.step("uploading", total, "bytes") as advance:
            yield advance


def _repository(api: "HfApi", repository: str, private: bool | None) -> "ModelInfo":
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        existing = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private is not False)
        return api.model_info(repository)
    if private is not None and existing.private != private:
        visibility = ("private", "public") if existing.private else ("public", "private")
        raise UsageError(
            f"{repository}: is {visibility[0]} already, --{visibility[1]} was given; change it in its settings on the "
            "hub, or name another repository"
        )
    return existing


def _warn_of_others(repository: str, existing: "ModelInfo", uploads: Sequence[Upload]) -> None:
    """Warn of other models in the repository: the new card omits them, and one tag may stand for two files."""
    ours = {one.name for one in uploads}
    tags = {quant_tag(name) for name in ours if is_model_file(name)}
    for name in (file.rfilename for file in existing.siblings or ()):
        if is_model_file(name) and name not in ours:
            same = "has the same tag, so that -hf may take either, and " if quant_tag(name) in tags else ""
            log.warning("%s: %s is there already; it %swill not be on the new card", repository, name, same)


def _check_arrived(api: "HfApi", repository: str, commit: str, uploads: Sequence[Upload]) -> None:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repository, revision=commit, recursive=True)
    files = {file.path: file for file in tree if isinstance(file, RepoFile)}
    for one in uploads:
        found = files.get(one.name)
        digest = found.lfs.sha256 if found and found.lfs else one.sha256
        if found is None or found.size != one.size_bytes or (one.sha256 and digest != one.sha256):
            raise ValidationError(f"{repository}: {one.name} is not there as it was sent; run the command again")
