"""tokenizer.* keys from a checkpoint's tokenizer.json or tiktoken.model: BPE of any kind that a family has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from mode_gguf.architectures import TOKENIZERS
from mode_gguf.architectures.tokenizer import Tokenizer, added_tokens
from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.checkpoint.folder import read_json
from mode_gguf.checkpoint.side_files import unmarked
from mode_gguf.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_NO_SCORE = -1000.0
"""The score of tokens whose merges say all; what llama.cpp's converter writes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and their types by id, and the tokenizer that they belong to."""

    tokens: list[str]
    token_types: list[TokenType]
    tokenizer: Tokenizer


def add_tokenizer_keys(
    writer: GGUFWriter,
    folder: Path,
    vocabulary_size: int,
    pre_tokenizer: str | None = None,
    special_tokens: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add every tokenizer.* key of a checkpoint: tokens, merges, special ids, chat template.

    Args:
        vocabulary_size: rows of the token embedding; ids without a token are padded.
        pre_tokenizer: llama.cpp's name of it, when it cannot be recognised.
        special_tokens: further roles of tokens, such as `eot`, and which tokens have them.

    Raises:
        InputError: a tokenizer file cannot be used, or the pre-tokenizer is not known and not given.
    """
    vocabulary = read_vocabulary(folder, vocabulary_size, pre_tokenizer)
    tiktoken = tiktoken_model.has_tiktoken_model(folder)
    post_processor = {} if tiktoken else _read_tokenizer(folder).get("post_processor") or {}
    try:
        with unmarked(folder) as readable:
            special = SpecialVocab(readable, load_merges=not tiktoken, n_vocab=vocabulary_size)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(
            f"{folder}: special tokens or merges cannot be read from tokenizer.json and tokenizer_config.json "
            f"({error!r}); download them again"
        ) from error
    if tiktoken:
        ranks = tiktoken_model.read_ranks(folder / tiktoken_model.FILE)
        special.merges = [" ".join(merge) for merge in tiktoken_model.last_merges(ranks)]
    if not special.merges:
        raise InputError(f"{folder / 'tokenizer.json'}: no merges found, expected byte-level BPE; download it again")
    for role, token in special_tokens.items():
        if token not in vocabulary.tokens:
            raise InputError(f"{folder / 'tokenizer.json'}: token {token} is missing, expected it as {role}")
        special.special_token_ids[role] = vocabulary.tokens.index(token)
    writer.add_tokenizer_model(vocabulary.tokenizer.model)
    if vocabulary.tokenizer.is_byte_level:
        writer.add_tokenizer_pre(vocabulary.tokenizer.pre_tokenizer)
    else:
        writer.add_token_scores([_NO_SCORE] * len(vocabulary.tokens))
        writer.add_add_space_prefix(False)
        special.add_special_token["bos"] = True  # llama.cpp insists on it
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    if post_processor.get("type") == "ByteLevel":  # it adds no token, which gguf's reader does not conclude
        for kind in ("bos", "eos"):
            special.add_special_token.setdefault(kind, False)
    # gguf's reader takes ids of special tokens from tokenizer.json, or from config.json, which is enough for tiktoken's
    if not tiktoken and not (folder / "tokenizer.json").exists():
        special.special_token_ids |= _special_ids(folder, vocabulary)
    special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, size: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """Tokens 0 to `size` - 1; raises like `add_tokenizer_keys`."""
    tiktoken = tiktoken_model.has_tiktoken_model(folder)
    path = folder / (tiktoken_model.FILE if tiktoken else "tokenizer.json")
    tokenizer = tiktoken_model.tokenizer_json(folder) if tiktoken else _read_tokenizer(folder)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path}: expected a BPE model with a vocabulary; other tokenizers are not supported")
    kind = _named(pre_tokenizer) if pre_tokenizer else _recognised(path, tokenizer)
    token_types = dict.fromkeys(model["vocab"], TokenType.NORMAL)
    ids = dict(model["vocab"])
    for token, number, special in added_tokens(folder, tokenizer):
        ids[token] = number
        token_types[token] = TokenType.CONTROL if special or _looks_special(token) else TokenType.USER_DEFINED
    if not kind.is_byte_level:
        token_types |= {token: TokenType.BYTE for token in token_types if _BYTE_TOKEN.fullmatch(token)}
    token_types |= {token: TokenType.USER_DEFINED for token in token_types if token in kind.visible}
    by_id: dict[int, str] = {}
    for token, number in ids.items():
        if not isinstance(number, int) or not 0 <= number < size:
            raise InputError(
                f"{path}: token {token!r} has id {number!r}, expected less than the {size} rows of the token "
                "embedding; use the tokenizer published with these weights"
            )
        if number in by_id:
            raise InputError(f"{path}: tokens {by_id[number]!r} and {token!r} share id {number}; download it again")
        by_id[number] = token
    return Vocabulary(
        tokens=[by_id.get(i, f"[PAD{i}]") for i in range(size)],
        token_types=[token_types[by_id[i]] if i in by_id else TokenType.UNUSED for i in range(size)],
        tokenizer=kind,
    )


def _read_tokenizer(folder: Path) -> Mapping[str, Any]:
    """The content of tokenizer.json, or its equivalent where vocab.json and merges.txt are enough."""
    path, vocabulary, config = (folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"))
    if not path.exists() and vocabulary.exists() and config.exists():
        slow_class = str(read_json(config).get("tokenizer_class")).removesuffix("Fast")
        for tokenizer in TOKENIZERS:
            if tokenizer.slow_class == slow_class:
                return tokenizer.as_json(read_json(vocabulary))
    return read_json(path)


def _special_ids(folder: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json names for a purpose, such as `eos`."""
    config = read_json(folder / "tokenizer_config.json")
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    named = {kind: config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    named = {kind: token.get("content") if isinstance(token, dict) else token for kind, token in named.items()}
    return {kind: ids[token] for kind, token in named.items() if isinstance(token, str) and token in ids}


def _named(pre_tokenizer: str) -> Tokenizer:
    """The tokenizer with llama.cpp's name, byte-level BPE where no family has it."""
    known = (tokenizer for tokenizer in TOKENIZERS if tokenizer.pre_tokenizer == pre_tokenizer)
    return next(known, Tokenizer(pre_tokenizer))


def _recognised(path: Path, tokenizer: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose normaliser and split expression a tokenizer.json has.

    Raises:
        InputError: they are none that is known.
    """
    known = next((kind for kind in TOKENIZERS if kind.reads(tokenizer)), None)
    if known is None:
        names = ", ".join(kind.pre_tokenizer for kind in TOKENIZERS)
        raise InputError(
            f"{path}: the pre-tokenizer is not one known here ({names}); name llama.cpp's pre-tokenizer with "
            "--set checkpoint.pre_tokenizer=NAME, such as qwen2 or llama-bpe"
        )
    return known


def _looks_special(token: str) -> bool:
    """Qwen marks some control tokens, such as <|fim_prefix|>, as not special; llama.cpp treats them as control."""
    return token.startswith("<|") and token.endswith("|>")
