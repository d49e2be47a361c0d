"""general.* values of a checkpoint, from its model card, generation settings and name, in forms that GGUF can hold."""

import logging
import math
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import yaml  # what gguf reads model cards with

from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.checkpoint.side_files import unmarked
from mode_gguf.errors import InputError

CARD, GENERATION = "README.md", "generation_config.json"

_MAX_CARD_BYTES: Final = 2**24
_SAMPLING: Final[Mapping[str, tuple[str, type]]] = {
    "sequence": ("sampling_sequence", str),
    "top_k": ("sampling_top_k", int),
    "top_p": ("sampling_top_p", float),
    "min_p": ("sampling_min_p", float),
    "xtc_probability": ("sampling_xtc_probability", float),
    "xtc_threshold": ("sampling_xtc_threshold", float),
    "temperature": ("sampling_temp", float),
    "penalty_last_n": ("sampling_penalty_last_n", int),
    "penalty_repeat": ("sampling_penalty_repeat", float),
    "mirostat": ("sampling_mirostat", int),
    "mirostat_tau": ("sampling_mirostat_tau", float),
    "mirostat_eta": ("sampling_mirostat_eta", float),
}
"""Generation settings that GGUF has a key for: their field in `gguf.Metadata` and their type there."""
_LISTS: Final = ("tags", "languages", "language", "pipeline_tag", "license")
"""Fields of a card that may be lists of texts."""
_DATASETS: Final = ("datasets", "dataset", "dataset_sources")
_NAMES: Final = (
    *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
    *("url", "doi", "uuid", "repo_url"),
)
_TEXTS: Final = (
    *_NAMES,
    *(f"model_{name}" for name in _NAMES),
    *("model_creator", "model_type", "license_name", "license_link"),
)
_NO_WORDS: Final[Mapping[bool, str]] = MappingProxyType({})

log = logging.getLogger(__name__)


def read_model_card(checkpoint: Checkpoint) -> gguf.Metadata:
    """What a checkpoint says about itself, as gguf understands it; values that GGUF cannot hold are left out.

    Numbers, dates and truth values where texts are expected, as YAML reads `- 2025` or `version: 1.0`, become texts;
    whole numbers written as `20.0` become whole. Of anything else that has the wrong type a warning says that it is
    left out: it describes the model, and does not change what the file computes.

    Raises:
        InputError: README.md or generation_config.json cannot be read at all.
    """
    path = checkpoint.path if checkpoint.path.name.strip(".") else checkpoint.path.resolve()
    card = _card_values(path / CARD, _front_matter(path))
    called = checkpoint.config.get("_name_or_path")
    try:
        about = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(), card, {"_name_or_path": called} if isinstance(called, str) else {}, path
        )
        if checkpoint.repository:  # the folder's name, which gguf reads, is a hash
            full_name, _, *parts = gguf.Metadata.get_model_id_components(checkpoint.repository)
            about.name = gguf.Metadata.id_to_title(full_name)
            about.basename, about.finetune, about.version, about.size_label = parts
    except Exception as error:  # it takes names apart without looking at what they are
        raise InputError(f"{path / CARD}: names in it cannot be read ({error!r}); correct or remove them") from error
    for name, value in _sampling(path / GENERATION).items():
        setattr(about, name, value)
    for field in fields(about):
        value = getattr(about, field.name)
        if isinstance(value, str):
            setattr(about, field.name, _storable(value))
    return about


def _front_matter(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        if path.is_file() and (size := path.stat().st_size) > _MAX_CARD_BYTES:
            raise InputError(f"{path}: {size:,} bytes found, {_MAX_CARD_BYTES:,} at most are read; shorten it")
        with unmarked(folder) as readable:
            found: dict[str, Any] = gguf.Metadata.load_model_card(readable)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its front matter cannot be read ({reason:.300}); correct or remove it") from error
    return found


def _card_values(path: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a card that GGUF has keys for, with values it can hold.

    Base models are left out: the file's own is the checkpoint.
    """
    values: dict[str, Any] = {}
    for name in _TEXTS:
        if card.get(name) is not None:
            values[name] = _text(path, name, card[name])
    for name in _LISTS:
        if card.get(name) is not None:
            # "no" is Norwegian, and YAML's word for false.
            values[name] = _texts(path, name, card[name], {False: "no"} if name.startswith("language") else _NO_WORDS)
    for name in _DATASETS:
        if card.get(name) is not None:
            found = card[name] if isinstance(card[name], list) else [card[name]]
            values[name] = [one for entry in found if (one := _dataset(path, name, entry)) is not None]
    return {name: value for name, value in values.items() if value is not None and value != []}


def _texts(path: Path, name: str, value: Any, words: Mapping[bool, str]) -> list[str] | str | None:
    if not isinstance(value, list):
        return _text(path, name, value, words)
    found = (_text(path, name, one, words) for one in value if one is not None)
    return [one for one in found if one is not None]


def _dataset(path: Path, name: str, entry: Any) -> str | dict[str, str] | None:
    if not isinstance(entry, Mapping):
        return None if entry is None else _text(path, name, entry)
    texts = {str(key): _text(path, f"{name}.{key}", value) for key, value in entry.items() if value is not None}
    return {key: value for key, value in texts.items() if value is not None}


def _text(path: Path, name: str, value: Any, words: Mapping[bool, str] = _NO_WORDS) -> str | None:
    """A scalar of YAML as text; None, and a warning, for what is none."""
    if isinstance(value, bool):
        return words.get(value, str(value).lower())
    if isinstance(value, int | float | date):
        return str(value)
    if isinstance(value, str):
        return _storable(value)
    log.warning("%s: %s is %s, expected a text; it is left out of the file", path, name, type(value).__name__)
    return None


def _storable(text: str) -> str:
    """A text that UTF-8 can hold: halves of characters become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _sampling(path: Path) -> dict[str, str | int | float]:
    """Generation settings by their field in `gguf.Metadata`."""
    if not path.exists():
        return {}
    settings = read_json(path)
    found: dict[str, str | int | float] = {}
    for name, (field, kind) in _SAMPLING.items():
        value = settings.get(name)
        if value is None:
            continue
        stored = _as_kind(value, kind)
        if stored is None:
            expected = {str: "a text", int: "a whole number", float: "a number"}[kind]
            log.warning("%s: %s is %.80r, expected %s; it is left out of the file", path, name, value, expected)
        else:
            found[field] = stored
    return found


def _as_kind(value: Any, kind: type) -> str | int | float | None:
    if kind is str:
        return _storable(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind is int:
        whole = isinstance(value, int) or (math.isfinite(value) and value.is_integer())
        return int(value) if whole and abs(value) < 2**31 else None
    return value if abs(value) < 3e38 else None  # no NaN either
