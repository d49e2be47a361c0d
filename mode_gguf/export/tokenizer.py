"""tokenizer.* keys from a checkpoint's tokenizer.json or tiktoken.model: byte-level BPE, which llama.cpp calls `gpt2`,
and Gemma 4's."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.checkpoint.folder import read_json
from mode_gguf.errors import InputError

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GLM4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_PRE_TOKENIZERS = {
    ("NFC", QWEN2_SPLIT): "qwen2",
    ("NFC", QWEN35_SPLIT): "qwen35",
    ("None", GLM4_SPLIT): "glm4",
    ("None", TEKKEN_SPLIT): "tekken",
    ("None", tiktoken_model.KIMI_SPLIT): "kimi-k2",
}
"""llama.cpp's name of a pre-tokenizer, by normaliser and split expression.

llama.cpp's converter finds the name by hashing the ids of a fixed text, which knows each public vocabulary but no
retrained one; what the name stands for is these.
"""

GEMMA4 = "gemma4"
"""llama.cpp's name for BPE over whole texts: spaces are U+2581, and characters without a token become bytes."""
_GEMMA4_VISIBLE = {
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
}
"""Special tokens that llama.cpp writes out, as its chat parser looks for them."""
_UNDERLINED_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_NO_SCORE = -1000.0
"""Of tokens whose merges say all; what llama.cpp's converter writes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and their kinds by id, and llama.cpp's name of the pre-tokenizer."""

    tokens: list[str]
    kinds: list[TokenType]
    pre_tokenizer: str


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
    tiktoken = tiktoken_model.is_published_so(folder)
    post_processor = {} if tiktoken else _read_tokenizer(folder).get("post_processor") or {}
    try:
        special = SpecialVocab(folder, load_merges=not tiktoken, n_vocab=vocabulary_size)
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
    if vocabulary.pre_tokenizer == GEMMA4:
        writer.add_tokenizer_model(GEMMA4)
        writer.add_token_scores([_NO_SCORE] * len(vocabulary.tokens))
        writer.add_add_space_prefix(False)
        special.add_special_token["bos"] = True  # llama.cpp insists on it
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if post_processor.get("type") == "ByteLevel":  # it adds no token, which gguf's reader does not conclude
        for kind in ("bos", "eos"):
            special.add_special_token.setdefault(kind, False)
    # gguf's reader takes ids of special tokens from tokenizer.json, or from config.json, which is enough for Kimi
    if not tiktoken and not (folder / "tokenizer.json").exists():
        special.special_token_ids |= _special_ids(folder, vocabulary)
    special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, size: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """Tokens 0 to `size` - 1; raises like `add_tokenizer_keys`."""
    tiktoken = tiktoken_model.is_published_so(folder)
    path = folder / (tiktoken_model.FILE if tiktoken else "tokenizer.json")
    tokenizer = tiktoken_model.tokenizer_json(folder) if tiktoken else _read_tokenizer(folder)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path}: expected a BPE model with a vocabulary; other tokenizers are not supported")
    pre_tokenizer = pre_tokenizer or recognised_pre_tokenizer(path, tokenizer)
    kinds = dict.fromkeys(model["vocab"], TokenType.NORMAL)
    ids = dict(model["vocab"])
    for token, number, special in _added_tokens(folder, tokenizer):
        ids[token] = number
        kinds[token] = TokenType.CONTROL if special or _looks_special(token) else TokenType.USER_DEFINED
    if pre_tokenizer == GEMMA4:
        kinds |= {token: TokenType.BYTE for token in kinds if _BYTE_TOKEN.fullmatch(token)}
        kinds |= {token: TokenType.USER_DEFINED for token in kinds if token in _GEMMA4_VISIBLE}
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
        kinds=[kinds[by_id[i]] if i in by_id else TokenType.UNUSED for i in range(size)],
        pre_tokenizer=pre_tokenizer,
    )


def _read_tokenizer(folder: Path) -> Mapping[str, Any]:
    """tokenizer.json, or what it says of Qwen2's tokenizer, which vocab.json and merges.txt are enough for."""
    path, vocabulary, config = (folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"))
    if path.exists() or not vocabulary.exists() or not config.exists():
        return read_json(path)
    if str(read_json(config).get("tokenizer_class")).removesuffix("Fast") != "Qwen2Tokenizer":
        return read_json(path)
    return {
        "model": {"type": "BPE", "vocab": read_json(vocabulary)},
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]
        },
        "post_processor": {"type": "ByteLevel"},
    }


def _special_ids(folder: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json names for a purpose, such as `eos`."""
    config = read_json(folder / "tokenizer_config.json")
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    named = {kind: config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    named = {kind: token.get("content") if isinstance(token, dict) else token for kind, token in named.items()}
    return {kind: ids[token] for kind, token in named.items() if isinstance(token, str) and token in ids}


def recognised_pre_tokenizer(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the normaliser and split expression of a tokenizer.json.

    Raises:
        InputError: they are none that is known.
    """
    normalizer = tokenizer.get("normalizer") or {}
    if normalizer == _UNDERLINED_SPACES and tokenizer["model"].get("byte_fallback") is True:
        return GEMMA4
    steps = tokenizer.get("pre_tokenizer") or {}
    match steps.get("pretokenizers", [steps]):
        case [
            {"type": "Split", "pattern": {"Regex": str(split)}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            known = _PRE_TOKENIZERS.get((str(normalizer.get("type")), split))
        case _:
            known = None
    if known is None:
        raise InputError(
            f"{path}: the pre-tokenizer is not one known here ({', '.join([*_PRE_TOKENIZERS.values(), GEMMA4])}); name "
            "llama.cpp's pre-tokenizer with --set checkpoint.pre_tokenizer=NAME, such as qwen2 or llama-bpe"
        )
    return known


def _added_tokens(folder: Path, tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Token, id and whether it is special, from tokenizer.json and tokenizer_config.json, which may know more."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    try:
        for token in tokenizer.get("added_tokens", ()):
            yield str(token["content"]), int(token["id"]), bool(token["special"])
        for number, token in config.get("added_tokens_decoder", {}).items():
            yield str(token["content"]), int(number), bool(token.get("special", False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: added tokens cannot be read ({error!r}); download the tokenizer again") from error


def _looks_special(token: str) -> bool:
    """Qwen marks some control tokens, such as <|fim_prefix|>, as not special; llama.cpp treats them as control."""
    return token.startswith("<|") and token.endswith("|>")
