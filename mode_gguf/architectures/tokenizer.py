"""Tokenizers by llama.cpp's names, and their recognition in a checkpoint's tokenizer.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

BYTE_LEVEL: Final = "gpt2"
"""tokenizer.ggml.model of byte-level BPE, where a letter stands for every byte."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A BPE tokenizer as llama.cpp knows it.

    llama.cpp's converter finds the name of a pre-tokenizer by hashing the ids of a fixed text, which knows each public
    vocabulary but no retrained one; what the name stands for is a normaliser and a split expression.

    Attributes:
        pre_tokenizer: llama.cpp's name, such as `qwen2`.
        split: regular expression that cuts texts ahead of byte-level BPE.
        normalizer: the kind of normaliser ahead of it.
        model: tokenizer.ggml.model; any other than byte-level BPE is over whole texts, in which spaces are U+2581 and
            characters without a token become bytes.
        visible: special tokens that llama.cpp writes out, as its chat parser looks for them.
        special_tokens: roles of tokens, such as `eot`, that llama.cpp's converter gives and no tokenizer file names.
        slow_class: transformers' class of the tokenizer, where vocab.json and merges.txt are enough for it.
        defaults: tokens by role, such as `pad`, where no file says anything of it; of transformers' class.
    """

    pre_tokenizer: str
    split: str | None = None
    normalizer: str | None = None
    model: str = BYTE_LEVEL
    visible: frozenset[str] = frozenset()
    special_tokens: Mapping[str, str] = field(default_factory=dict, hash=False)
    slow_class: str | None = None
    defaults: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_byte_level(self) -> bool:
        """Whether a letter of its tokens stands for every byte of a text."""
        return self.model == BYTE_LEVEL

    def reads(self, tokenizer: Mapping[str, Any]) -> bool:
        """Whether the content of a tokenizer.json is this tokenizer's."""
        normalizer = tokenizer.get("normalizer") or {}
        if not self.is_byte_level:
            return bool(normalizer == _UNDERLINED_SPACES and tokenizer["model"].get("byte_fallback") is True)
        steps = tokenizer.get("pre_tokenizer") or {}
        match steps.get("pretokenizers", [steps]):
            case [
                {"type": "Split", "pattern": {"Regex": str(split)}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]:
                return split == self.split and normalizer.get("type") == self.normalizer
        return False

    def as_json(self, vocabulary: Mapping[str, Any]) -> Mapping[str, Any]:
        """The content of a tokenizer.json for a tokenizer that is published as vocab.json and merges.txt."""
        split = {"type": "Split", "pattern": {"Regex": self.split}, "behavior": "Isolated"}
        letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        return {
            "model": {"type": "BPE", "vocab": vocabulary},
            "normalizer": {"type": self.normalizer},
            "pre_tokenizer": {"pretokenizers": [split, letters]},
            "post_processor": {"type": "ByteLevel"},
        }


_UNDERLINED_SPACES: Final = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}

QWEN_DEFAULTS: Final = dict.fromkeys(("eos", "unk", "pad"), "<|endoftext|>")

QWEN2: Final = Tokenizer(
    "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    normalizer="NFC",
    slow_class="Qwen2Tokenizer",
    defaults=QWEN_DEFAULTS,
)
"""The tokenizer of Qwen2 and Qwen3, and of what is made from them."""
