"""Tokens beside a tokenizer's vocabulary, and tokens with a purpose, from the files that may name them.

Four files do, saved by different versions of transformers. What counts is what transformers 5 makes of them
(`PreTrainedTokenizerBase.from_pretrained` and `TokenizersBackend`): tokenizer_config.json's `added_tokens_decoder`, or
else special_tokens_map.json, added_tokens.json and tokenizer.json.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.errors import InputError

ROLES: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Purposes of tokens that transformers knows by name."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the vocabulary: its text, its id, whether it is special, and the file that says so."""

    content: str
    number: int
    special: bool
    file: Path


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """What a checkpoint's files say of tokens beside the vocabulary.

    Attributes:
        added: by text, in the order in which transformers adds them.
        named: tokens by `ROLES`; None where the files name none on purpose.
        further: texts of special tokens without such a role.
    """

    added: Mapping[str, AddedToken]
    named: Mapping[str, str | None] = field(default_factory=dict)
    further: tuple[str, ...] = ()

    def numbered(self, vocabulary: Mapping[str, int], named: Mapping[str, str], size: int) -> dict[str, AddedToken]:
        """All added tokens with the ids that the `tokenizers` library gives them: each the next after the last.

        Args:
            vocabulary: ids of the model's tokens.
            named: tokens by role; those that no vocabulary has are added, as the `further` ones.
            size: rows of the embedding, which such tokens may lie beyond: nothing can be written with them then.

        Raises:
            InputError: a file says another id: the embedding's rows would be other tokens'.
        """
        found: dict[str, AddedToken] = {}
        last = -1
        for content, token in self.added.items():
            number = vocabulary.get(content, max(len(vocabulary), last + 1))
            if number != token.number:
                raise InputError(
                    f"{token.file}: token {content!r:.100} has id {token.number}, and transformers gives it {number}: "
                    "the ids before it are not all there, or the vocabulary has it; use the tokenizer published with "
                    "these weights"
                )
            found[content] = AddedToken(content, number, token.special or content in named.values(), token.file)
            last = max(last, number)
        for content in (*named.values(), *self.further):
            if content not in found:
                number = vocabulary.get(content, max(len(vocabulary), last + 1))
                last = max(last, number)
                if number < size:
                    found[content] = AddedToken(content, number, True, Path())
        return found


def token_settings(folder: Path, tokenizer: Mapping[str, Any]) -> TokenSettings:
    """What the files in `folder` say.

    Args:
        tokenizer: the content of tokenizer.json; empty without one.

    Raises:
        InputError: one of the files cannot be read so.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    with _readable(folder / "tokenizer.json"):
        in_json = [
            AddedToken(str(token["content"]), int(token["id"]), bool(token["special"]), folder / "tokenizer.json")
            for token in tokenizer.get("added_tokens") or ()
        ]
    with _readable(path):
        if "added_tokens_decoder" in config:
            decoder = [
                AddedToken(str(token["content"]), int(number), bool(token.get("special", False)), path)
                for number, token in config["added_tokens_decoder"].items()
            ]
        else:
            decoder = None
    if decoder is None:
        config = {**config, **_special_tokens_map(folder)}
    with _readable(path):
        named = {role: _text(config[f"{role}_token"]) for role in ROLES if f"{role}_token" in config}
        further = tuple(_further(config))
    if decoder is None:
        special = {*named.values(), *further}
        decoder = [*_added_tokens_json(folder, special), *in_json]
    decoder.sort(key=lambda token: token.number)
    added: dict[str, AddedToken] = {}
    for token in (*in_json, *decoder):
        added[token.content] = token
    by_number = sorted(added.values(), key=lambda token: token.number)
    return TokenSettings({token.content: token for token in by_number}, named, further)


def special_token(checkpoint: Checkpoint, token: str) -> int:
    """The id of a special token that config.json does not name.

    Raises:
        InputError: the checkpoint's tokenizer has no such token.
    """
    path = checkpoint.path / "tokenizer.json"
    added = token_settings(checkpoint.path, read_json(path) if path.exists() else {}).added
    if token in added:
        return added[token].number
    raise InputError(
        f"{checkpoint.path}: the tokenizer has no added token {token}; use the one published with these weights"
    )


def _special_tokens_map(folder: Path) -> dict[str, Any]:
    path = folder / "special_tokens_map.json"
    return read_json(path) if path.exists() else {}


def _added_tokens_json(folder: Path, special: Iterable[str | None]) -> Iterator[AddedToken]:
    path = folder / "added_tokens.json"
    if path.exists():
        found = read_json(path)
        with _readable(path):
            for content, number in found.items():
                yield AddedToken(str(content), int(number), content in special, path)


def _further(config: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens without a role that transformers knows: in lists, or under names of the model's own."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    for token in found.values() if isinstance(found, dict) else found:
        text = _text(token)
        if text is not None:
            yield text
    for name, value in config.items():
        if name.endswith("_token") and name.removesuffix("_token") not in ROLES and isinstance(value, str):
            yield value


def _text(token: Any) -> str | None:
    """The text of a token that is written as such, or as an object."""
    if token is None:
        return None
    if isinstance(token, dict):
        token = token["content"]
    if not isinstance(token, str):
        raise TypeError(f"{token!r} is no token")
    return token


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: added tokens cannot be read ({error!r}); download the tokenizer again") from error
