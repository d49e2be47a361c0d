"""tokenizer.* keys from a checkpoint's tokenizer.json or tiktoken.model: BPE of any kind that a family has."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, SpecialVocab, TokenType

from mode_gguf.architectures import TOKENIZERS, find_family, text_tensors
from mode_gguf.architectures.added_tokens import token_settings
from mode_gguf.architectures.tensors import Role
from mode_gguf.architectures.tokenizer import Tokenizer
from mode_gguf.chat_templates.sources import ChatTemplates, chat_templates
from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.checkpoint.side_files import unmarked
from mode_gguf.checkpoint.text_files import refuse_lfs_pointer
from mode_gguf.errors import InputError, foreign_errors

log = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_SURROGATES = re.compile("[\ud800-\udfff]")

_NO_SCORE = -1000.0
"""The score of tokens whose merges say all; what llama.cpp's converter writes."""


_KNOWN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>"),
    )
)
"""Texts of tokens that llama.cpp takes for the end of a text (llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and their types by id, the tokenizer that they belong to, and tokens by role, such as `eos`."""

    tokens: list[str]
    token_types: list[TokenType]
    tokenizer: Tokenizer
    named: Mapping[str, str]


def add_tokenizer_keys(
    writer: GGUFWriter,
    folder: Path,
    vocabulary_size: int,
    pre_tokenizer: str | None = None,
    expected: Tokenizer | None = None,
) -> None:
    """Add every tokenizer.* key of a checkpoint: tokens, merges, special ids, chat templates.

    Args:
        vocabulary_size: rows of the token embedding; ids without a token are padded.
        pre_tokenizer: llama.cpp's name of it, when it cannot be recognised.
        expected: the family's tokenizer, whose tokens for further roles, such as `eot`, must be there.

    Raises:
        InputError: a tokenizer file cannot be used, or the pre-tokenizer is not known and not given.
    """
    vocabulary = read_vocabulary(folder, vocabulary_size, pre_tokenizer, expected)
    templates = chat_templates(folder)
    tiktoken = tiktoken_model.has_tiktoken_model(folder)
    tokenizer = {} if tiktoken else _read_tokenizer(folder, expected)
    with foreign_errors(
        f"{folder}: special tokens or merges cannot be read from tokenizer.json, tokenizer_config.json and config.json",
        "download them again",
    ):
        refuse_lfs_pointer(folder / "merges.txt")
        with unmarked(folder) as readable:
            special = SpecialVocab(readable, load_merges=not tiktoken, n_vocab=vocabulary_size)
    if tiktoken:
        ranks = tiktoken_model.read_ranks(folder / tiktoken_model.FILE)
        special.merges = [" ".join(merge) for merge in tiktoken_model.last_merges(ranks)]
    elif not tokenizer["model"].get("merges", True):
        special.merges = []  # gguf's reader looks into merges.txt then, transformers does not
    if not special.merges or not all(isinstance(merge, str) and _is_unicode(merge) for merge in special.merges):
        raise InputError(f"{folder / 'tokenizer.json'}: no merges found, expected byte-level BPE; download it again")
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    # gguf's reader takes ids from config.json, too, where the tokenizer's own files name no token for a purpose
    special.special_token_ids |= {role: ids[token] for role, token in vocabulary.named.items() if token in ids}
    for role, token in expected.special_tokens.items() if expected else ():
        if token not in ids:
            raise InputError(f"{folder / 'tokenizer.json'}: token {token} is missing, expected it as {role}")
        special.special_token_ids[role] = ids[token]
    special.special_token_ids |= _further_ends(folder, vocabulary.tokens, special.special_token_ids)
    writer.add_tokenizer_model(vocabulary.tokenizer.model)
    if vocabulary.tokenizer.is_byte_level:
        writer.add_tokenizer_pre(vocabulary.tokenizer.pre_tokenizer)
    else:
        writer.add_token_scores([_NO_SCORE] * len(vocabulary.tokens))
        writer.add_add_space_prefix(False)
        special.add_special_token["bos"] = True  # llama.cpp insists on it
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    post_processor = tokenizer.get("post_processor")
    if (
        isinstance(post_processor, Mapping) and post_processor.get("type") == "ByteLevel"
    ):  # it adds no token, which gguf's reader does not conclude
        for kind in ("bos", "eos"):
            special.add_special_token.setdefault(kind, False)
    special.chat_template = None
    special.add_to_gguf(writer, quiet=True)
    _add_chat_templates(writer, templates)


def checked_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of the file that a checkpoint becomes, once all tokenizer.* keys could be made.

    None of a model whose base GGUF has them. Raises like `add_tokenizer_keys`.
    """
    if checkpoint.base is not None:
        return None
    expected = find_family(checkpoint).tokenizer
    size = next(tensor.shape[0] for tensor in text_tensors(checkpoint) if tensor.role is Role.EMBEDDING)
    writer = GGUFWriter(None, "check")
    add_tokenizer_keys(writer, checkpoint.path, size, checkpoint.pre_tokenizer, expected)
    return read_vocabulary(checkpoint.path, size, checkpoint.pre_tokenizer, expected)


def read_vocabulary(
    folder: Path, size: int, pre_tokenizer: str | None = None, expected: Tokenizer | None = None
) -> Vocabulary:
    """Tokens 0 to `size` - 1; arguments and errors as of `add_tokenizer_keys`."""
    tiktoken = tiktoken_model.has_tiktoken_model(folder)
    path = folder / (tiktoken_model.FILE if tiktoken else "tokenizer.json")
    tokenizer = tiktoken_model.tokenizer_json(folder) if tiktoken else _read_tokenizer(folder, expected)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path}: expected a BPE model with a vocabulary; other tokenizers are not supported")
    kind = _named(pre_tokenizer) if pre_tokenizer else _recognised(path, tokenizer)
    _check_ids(path, model["vocab"].items(), size)
    settings = token_settings(folder, tokenizer)
    for token in settings.added.values():
        _check_ids(token.file, [(token.content, token.number)], size)
    named = {role: token for role, token in {**kind.defaults, **settings.named}.items() if token is not None}
    added = settings.numbered(model["vocab"], named, size)
    token_types = dict.fromkeys(model["vocab"], TokenType.NORMAL)
    ids = dict(model["vocab"])
    for token in added.values():
        special = token.special or _looks_special(token.content)
        ids[token.content] = token.number
        token_types[token.content] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    if not kind.is_byte_level:
        token_types |= {token: TokenType.BYTE for token in token_types if _BYTE_TOKEN.fullmatch(token)}
    token_types |= {token: TokenType.USER_DEFINED for token in token_types if token in kind.visible}
    by_id = _check_ids(path, ids.items(), size)
    return Vocabulary(
        tokens=[by_id.get(i, f"[PAD{i}]") for i in range(size)],
        token_types=[token_types[by_id[i]] if i in by_id else TokenType.UNUSED for i in range(size)],
        tokenizer=kind,
        named=named,
    )


def _check_ids(path: Path, ids: Iterable[tuple[str, Any]], size: int) -> dict[int, str]:
    """Tokens by id; refuses ids that are none of the embedding's rows, and those of several tokens."""
    by_id: dict[int, str] = {}
    for token, number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < size:
            raise InputError(
                f"{path}: token {token!r:.100} has id {number!r:.20}, expected less than the {size} rows of the token "
                "embedding; use the tokenizer published with these weights"
            )
        if not _is_unicode(token):
            raise InputError(f"{path}: token {number} is no Unicode text ({token!a:.100}); download it again")
        if number in by_id:
            raise InputError(f"{path}: tokens {by_id[number]!r} and {token!r} share id {number}; download it again")
        by_id[number] = token
    return by_id


def _is_unicode(text: str) -> bool:
    """Whether there are no halves of characters in it, which JSON allows and GGUF does not."""
    return text.isascii() or not _SURROGATES.search(text)


def _add_chat_templates(writer: GGUFWriter, templates: ChatTemplates) -> None:
    """The default template, and others under their names, as llama.cpp's converter writes them."""
    named = {re.sub(r"[^a-zA-Z0-9]", "_", name): text for name, text in sorted(templates.named.items())}
    for name, text in named.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text)
    if named:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(named))
    if templates.default is not None:
        writer.add_chat_template(templates.default)


def _further_ends(folder: Path, tokens: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    """Tokens that end a text by generation_config.json, in roles that are free, where llama.cpp would not know them.

    llama.cpp stops at tokens with one of these roles, and at those it knows by their texts.
    """
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    ends = [
        end
        for end in (found if isinstance(found, list) else [found])
        if isinstance(end, int) and not isinstance(end, bool) and 0 <= end < len(tokens)
    ]
    roles = [role for role in ("eos", "eot", "eom") if role not in known]
    taken = {known[role] for role in ("eos", "eot", "eom") if role in known}
    new: dict[str, int] = {}
    for end in ends:
        if end not in taken and tokens[end] not in _KNOWN_ENDS:
            if not roles:
                log.warning("%s: llama.cpp has no place for %s among the ends of a text", path, tokens[end])
                break
            new[roles.pop(0)] = end
            taken.add(end)
    return new


def _read_tokenizer(folder: Path, expected: Tokenizer | None) -> Mapping[str, Any]:
    """The content of tokenizer.json, or its equivalent where vocab.json and merges.txt are enough."""
    path, vocabulary, config = (folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"))
    if not path.exists() and vocabulary.exists() and config.exists():
        slow_class = str(read_json(config).get("tokenizer_class")).removesuffix("Fast")
        for tokenizer in (expected,) if expected else TOKENIZERS:
            if tokenizer.slow_class == slow_class:
                return tokenizer.as_json(read_json(vocabulary))
    if not path.exists():
        others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if (folder / name).exists()]
        if others:
            raise InputError(
                f"{path}: no such file, and {others[0]} alone is not read; download the model's tokenizer.json, or "
                "write it with the save_pretrained of transformers' AutoTokenizer"
            )
    return read_json(path)


def _named(pre_tokenizer: str) -> Tokenizer:
    """The tokenizer with llama.cpp's name, byte-level BPE where no family has it."""
    known = (tokenizer for tokenizer in TOKENIZERS if tokenizer.pre_tokenizer == pre_tokenizer)
    return next(known, Tokenizer(pre_tokenizer))


def _recognised(path: Path, tokenizer: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose normaliser and split expression a tokenizer.json has.

    Raises:
        InputError: they are none that is known.
    """
    with foreign_errors(f"{path}: normaliser or pre-tokenizer cannot be read", "download it again"):
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
