"""Probes: fixed prompts, and what transformers makes of them for one checkpoint.

Calibration, which runs the checkpoint in transformers, stores them; validation holds the exported files against them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.errors import InputError

Array: TypeAlias = np.ndarray

MOST_TOKENS: Final = 1 << 22
"""Tokens of a vocabulary, at most: ten times the largest one known."""
KIND: Final = "probes"
"""Kind of the artefact."""
LISTED: Final = 1024
"""Tokens whose probabilities are kept at each position: the likeliest ones, all of a vocabulary up to four times that
size. 32 positions of five probes then take 1.3 MB."""


@dataclass(frozen=True, slots=True)
class Distributions:
    """Next-token distributions at n positions, of which the k likeliest tokens are listed.

    Attributes:
        tokens: (n, k) int32.
        log_probs: (n, k) float32, in nats.
        vocabulary: number of all tokens.
    """

    tokens: Array
    log_probs: Array
    vocabulary: int

    @property
    def rows(self) -> Array:
        """(n, vocabulary) float32 log-probabilities, NaN where a token is not listed."""
        rows = np.full((len(self.tokens), self.vocabulary), np.nan, np.float32)
        np.put_along_axis(rows, self.tokens.astype(np.int64), self.log_probs, axis=1)
        return rows


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt as transformers' tokenizer and chat template make it, and what comes behind its last tokens.

    Attributes:
        name: for messages.
        text: the prompt, special tokens included; in a chat with a picture one token stands for it.
        tokens: ids of the whole prompt, a picture's included.
        beginning: how many of them the tokenizer itself puts ahead of a text.
        distributions: behind the last tokens.
        is_chat: whether a chat template has made it.
        picture: (height, width, 3) uint8; None without one.
        place: first of the picture's tokens, and the one behind its last; None without one.
    """

    name: str
    text: str
    tokens: tuple[int, ...]
    beginning: int
    distributions: Distributions
    is_chat: bool = False
    picture: Array | None = None
    place: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ChatSource:
    """Chat templates that transformers takes, its tokenizer and its processor, and the special tokens they can name."""

    templates: tuple[str, ...]
    bos: str = ""
    eos: str = ""


@dataclass(frozen=True, slots=True)
class Probes:
    """The probes of one checkpoint.

    Attributes:
        model: name of the model.
        fingerprint: of its checkpoint.
        dtype: that it was run in: `float32` or `bfloat16`.
        from_base: whether names, vocabulary, template and projector of its export are a base GGUF's.
        chat: None for a model without a chat template.
        special_tokens: ids of the tokenizer's special tokens that the model has an embedding of, by their texts.
        probes: those that the model could be run on.
    """

    model: str
    fingerprint: str
    dtype: str
    from_base: bool
    chat: ChatSource | None
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    probes: Sequence[Probe] = field(default_factory=tuple)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        arrays: dict[str, Array] = {}
        described = []
        for number, probe in enumerate(self.probes):
            arrays[f"{number}.tokens"] = np.asarray(probe.tokens, np.int32)
            arrays[f"{number}.listed"] = probe.distributions.tokens
            arrays[f"{number}.log_probs"] = probe.distributions.log_probs
            if probe.picture is not None:
                arrays[f"{number}.picture"] = probe.picture
            described.append(
                {
                    "name": probe.name,
                    "text": probe.text,
                    "beginning": probe.beginning,
                    "is_chat": probe.is_chat,
                    "vocabulary": probe.distributions.vocabulary,
                    "place": probe.place,
                }
            )
        chat = self.chat and {"templates": self.chat.templates, "bos": self.chat.bos, "eos": self.chat.eos}
        metadata = {
            "kind": KIND,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "from_base": self.from_base,
            "chat": chat,
            "special_tokens": dict(self.special_tokens),
            "probes": described,
        }
        write_arrays(path, arrays, metadata)

    @staticmethod
    def load(path: Path) -> "Probes":
        """Read the file that `save` wrote.

        Raises:
            InputError: it is missing, of another version, or not what `save` writes.
        """
        arrays, metadata = read_arrays(path, KIND)
        try:
            return Probes(
                model=str(metadata["model"]),
                fingerprint=str(metadata["fingerprint"]),
                dtype=str(metadata["dtype"]),
                from_base=bool(metadata["from_base"]),
                chat=TypeAdapter(ChatSource | None).validate_python(metadata["chat"]),
                special_tokens=TypeAdapter(dict[str, int]).validate_python(metadata["special_tokens"]),
                probes=tuple(_probe(arrays, number, one) for number, one in enumerate(metadata["probes"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise InputError(f"{path}: holds no probes as calibration writes them ({error})") from error


def _probe(arrays: Mapping[str, Array], number: int, described: Mapping[str, Any]) -> Probe:
    place = described["place"]
    probe = Probe(
        name=str(described["name"]),
        text=str(described["text"]),
        tokens=tuple(map(int, arrays[f"{number}.tokens"])),
        beginning=int(described["beginning"]),
        distributions=Distributions(
            arrays[f"{number}.listed"], arrays[f"{number}.log_probs"], int(described["vocabulary"])
        ),
        is_chat=bool(described["is_chat"]),
        picture=arrays.get(f"{number}.picture"),
        place=None if place is None else (int(place[0]), int(place[1])),
    )
    if not _is_sound(probe):
        raise ValueError(f"sizes or numbers of {probe.name!r:.40} do not go together")
    return probe


def _is_sound(probe: Probe) -> bool:
    """Whether arrays have the shapes, and numbers the ranges, that `Probe` says."""
    listed, log_probs = probe.distributions.tokens, probe.distributions.log_probs
    vocabulary = probe.distributions.vocabulary
    picture, place, length = probe.picture, probe.place, len(probe.tokens)
    return (
        0 < vocabulary <= MOST_TOKENS
        and listed.ndim == 2
        and listed.shape == log_probs.shape
        and listed.dtype.kind == "i"
        and log_probs.dtype.kind == "f"
        and 0 < len(listed) <= length
        and listed.shape[1] > 0
        and bool((listed >= 0).all() and (listed < vocabulary).all() and not np.isnan(log_probs).any())
        and 0 <= probe.beginning <= length
        and all(0 <= token < vocabulary for token in probe.tokens)
        and (picture is None) == (place is None)
        and (picture is None or (picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8))
        and (place is None or 0 <= place[0] < place[1] <= length - len(listed))
    )
