"""Names on the hub: of models, and of files as llama.cpp's `-hf` reads them."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from mode_gguf.errors import UsageError

_MODEL = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-\d{5}")
_TAG = re.compile(r"[-.](?P<tag>[A-Za-z0-9_]+)$")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub; `revision` is a branch, a tag or a commit, None for the main branch."""

    repository: str
    revision: str | None = None

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}"

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def hub_model(model: str | Path) -> HubModel | None:
    """The model on the hub that `ORG/NAME` or `ORG/NAME@REVISION` names; None for a path.

    Whatever exists on disk is a path, and so is what begins with `/`, `.` or `~`.
    """
    match = _MODEL.fullmatch(str(model))
    if match is None or Path(model).exists():
        return None
    return HubModel(match["repository"], match["revision"])


def is_repository(text: str) -> bool:
    """Whether `text` is `OWNER/NAME`."""
    match = _MODEL.fullmatch(text)
    return match is not None and match["revision"] is None


def repository_name(text: str) -> str:
    """`text` as the name of a repository to publish to.

    Raises:
        UsageError: it is none.
    """
    if not is_repository(text):
        raise UsageError(f"{text}: no name of a repository on the hub; give OWNER/NAME")
    return text


def quant_tag(file_name: str) -> str | None:
    """TAG of a GGUF file in `-hf REPOSITORY:TAG`: the part after the last `-` or `.`, in capitals; shards share one."""
    stem = PurePath(file_name).name.removesuffix(".gguf")
    shard = _SHARD.fullmatch(stem)
    match = _TAG.search(shard["stem"] if shard else stem)
    return match["tag"].upper() if match else None


def is_model_file(file_name: str) -> bool:
    """Whether `-hf` may take the file for the model, or for its first shard."""
    name = PurePath(file_name).name
    shard = _SHARD.fullmatch(name.removesuffix(".gguf"))
    first = shard is None or int(shard["number"]) == 1
    return name.endswith(".gguf") and first and not any(other in name for other in ("mmproj", "imatrix"))
