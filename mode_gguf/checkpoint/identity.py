"""The identity of a checkpoint: digests of everything that stages read of it.

Weights are known by their whole content. A few bytes of every tensor, or sizes and times, would be cheaper, and would
miss rows that were edited in place, or call a copied model another one; a digest is right in both cases and costs one
reading of files that a conversion reads several times. The work folder keeps it (`file_digests`), so that the next run
reads nothing. Files beside the weights are small and have an entry each in the keys of the stages that read them, so
that a refusal can name what changed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from mode_gguf.artifacts import fingerprint
from mode_gguf.errors import InputError
from mode_gguf.file_digests import digests_of
from mode_gguf.progress import Progress, silent

SideFiles: TypeAlias = tuple[str, ...]
"""Patterns of files beside the weights, by what they are for."""

TOKENIZER: Final[SideFiles] = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json"),
)
"""Tokenizer, all that transformers and gguf look for; without the chat template that its settings may hold."""
TEMPLATE: Final[SideFiles] = ("chat_template*", "additional_chat_templates/*", "tokenizer_config.json")
"""Chat templates, whichever of them wins; of the tokenizer's settings the one that they hold."""
PROCESSOR: Final[SideFiles] = ("*processor_config.json",)
"""Preparation of pictures."""
GENERAL: Final[SideFiles] = ("generation_config.json", "README.md")
"""Sampling settings, and the model card, whose front matter is read: GGUF files carry both."""

_CARD: Final = "README.md"
_SETTINGS: Final = "tokenizer_config.json"
_IN_SETTINGS: Final = "chat_template"
_MOST_SETTINGS: Final = 1 << 26


class _Stored(Protocol):
    @property
    def file(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What tells a model from all others: its settings and the content of its weights, wherever they lie.

    Attributes:
        settings: digest of config.json and of where the tensors are.
        files: of the weights; a base GGUF's, too.
        kept: file that keeps their digests for the next process.
        known: the fingerprint where another process has computed it.
    """

    settings: str
    files: tuple[Path, ...]
    kept: Path | None = None
    known: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> "ModelIdentity":
        """The identity of a checkpoint with this config.json, quantization_config included."""
        places = sorted((name, stored.file.name) for name, stored in tensors.items())
        return cls(fingerprint(config, places), tuple(sorted({stored.file for stored in tensors.values()})))

    def fingerprint(self, progress: Progress = silent) -> str:
        """The model's digest; the first time weights are read for it.

        Raises:
            InputError: one of the files cannot be read.
        """
        if self.known is not None:
            return self.known
        digests = digests_of(self.files, self.kept, progress)
        return fingerprint(self.settings, [(file.name, one) for file, one in zip(self.files, digests, strict=True)])


def side_files(folder: Path, *kinds: SideFiles) -> dict[str, str]:
    """Digests of the files beside the weights that are there, by name.

    Of the model card it is its front matter's; the chat template in tokenizer_config.json counts apart from the rest.

    Raises:
        InputError: one of them cannot be read.
    """
    if not folder.is_dir():  # a base GGUF stands for the model
        return {}
    patterns = [pattern for kind in kinds for pattern in kind]
    found = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in folder.glob(pattern)}
    files = {name: path for name, path in sorted(found.items()) if path.is_file()}
    digests = {name: digest[:16] for name, digest in zip(files, digests_of(list(files.values())), strict=True)}
    if card := files.get(_CARD):
        digests[f"front matter of {_CARD}"] = _front_matter(card)
        del digests[_CARD]
    if (settings := _settings(files.get(_SETTINGS))) is not None:
        template, _ = settings.pop(_IN_SETTINGS, None), digests.pop(_SETTINGS)
        apart = {_SETTINGS: (TOKENIZER, settings), f"{_IN_SETTINGS} of {_SETTINGS}": (TEMPLATE, template)}
        digests |= {name: fingerprint(value) for name, (kind, value) in apart.items() if kind in kinds and value}
    return digests


def _settings(path: Path | None) -> dict[str, Any] | None:
    """Settings of a tokenizer; None where they are no JSON object, so that the file counts as a whole."""
    if path is None or path.stat().st_size > _MOST_SETTINGS:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _front_matter(card: Path) -> str:
    """Digest of what gguf reads of a model card: the lines between the first two that are three hyphens."""
    try:
        lines = card.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{card}: cannot be read ({error.strerror})") from error
    if lines[:1] != ["---"]:
        return "none"
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    return hashlib.sha256("\n".join(lines[1:end]).encode(errors="replace")).hexdigest()[:16]
