"""Kimi's tokenizer as it is published: `tiktoken.model` and tokenizer_config.json, with code that is never run here.

`tiktoken.model` has a line for every token, its bytes in base64 and its rank. Text is cut by a split expression, and
in each piece the two neighbours whose union has the lowest rank are merged until no union is a token. Ids behind the
ranks are special tokens; tokenizer_config.json names some of them.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mode_gguf.checkpoint.folder import read_json
from mode_gguf.checkpoint.text_files import refuse_lfs_pointer
from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

FILE = "tiktoken.model"
SPECIAL_TOKENS = 256
"""Ids behind the ranks, named or not."""

KIMI_SPLIT = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

Merge = tuple[str, str]


def has_tiktoken_model(folder: Path) -> bool:
    """Whether a tiktoken.model is the only tokenizer in `folder`."""
    return (folder / FILE).exists() and not (folder / "tokenizer.json").exists()


@cache
def read_ranks(path: Path) -> Mapping[bytes, int]:
    """Rank, which is the id, of every token in a `tiktoken.model`.

    Raises:
        InputError: the file cannot be read so, or the ranks are not 0, 1, 2, ...
    """
    check_regular(path, "vocabulary")
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        refuse_lfs_pointer(path)
        raise InputError(f"{path}: expected a token in base64 and its rank per line ({error})") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: expected ranks 0, 1, 2, ... of different tokens; download it again")
    return ranks


def special_tokens(folder: Path) -> dict[str, int]:
    """Special tokens with their ids, named or not.

    Raises:
        InputError: tokenizer_config.json cannot be used.
    """
    path = folder / "tokenizer_config.json"
    first = len(read_ranks(folder / FILE))
    try:
        named = {int(n): str(token["content"]) for n, token in read_json(path).get("added_tokens_decoder", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: added tokens cannot be read ({error!r}); download it again") from error
    return {named.get(n, f"<|reserved_token_{n}|>"): n for n in range(first, first + SPECIAL_TOKENS)}


def byte_level_text(token: bytes) -> str:
    """A token as byte-level BPE writes it: a letter for every byte."""
    return "".join(_letters()[byte] for byte in token)


def last_merges(ranks: Mapping[bytes, int]) -> Iterator[Merge]:
    """The merge that completes each token when its own bytes are merged: as llama.cpp's converter writes them."""
    for token, rank in ranks.items():
        parts = _merged(ranks, token, rank)
        if len(parts) == 2:
            yield byte_level_text(parts[0]), byte_level_text(parts[1])


def all_merges(ranks: Mapping[bytes, int]) -> list[Merge]:
    """Every way to complete each token, by its rank: what the rule in this module's description allows."""
    return [
        (byte_level_text(token[:i]), byte_level_text(token[i:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in sorted(range(1, len(token)), key=lambda i: (ranks.get(token[:i], -1), ranks.get(token[i:], -1)))
        if token[:i] in ranks and token[i:] in ranks
    ]


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """The tokenizer of `folder` as the content of a tokenizer.json, which the `tokenizers` library reads."""
    ranks = read_ranks(folder / FILE)
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": KIMI_SPLIT}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": token, **plain} for token, n in special_tokens(folder).items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "post_processor": None,
        "decoder": letters,
        "model": {
            "type": "BPE",
            "vocab": {byte_level_text(token): rank for token, rank in ranks.items()},
            "merges": [list(merge) for merge in all_merges(ranks)],
            "ignore_merges": True,
        },
    }


def _merged(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """The bytes of `token` merged by every rank below `limit`, lowest first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        unions = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        lowest = min(unions)
        if lowest >= limit:
            break
        i = unions.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@cache
def _letters() -> list[str]:
    """Byte-level BPE's letter of each byte: itself where it is printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    further = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(further)) for byte in range(256)]
