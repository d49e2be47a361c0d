"""A byte-level BPE tokenizer trained on a few sentences, with a family's split and special tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.families.pico.files import write_json

VOCAB = 512
TRAINED = 400
"""Size of the trained vocabulary, which special tokens follow as in Qwen's files; the rest up to VOCAB is padding."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
"""Of special tokens, in tokenizer_config.json."""
IMAGE_OF_TEMPLATE = "<|vision_start|><|image_pad|><|vision_end|>"
TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the colour of the square in the image? "
    "The square is red. The circle is blue, and the triangle on the left is green. How many shapes are there? "
    "There are 3 shapes: a square, a circle and a triangle. Describe the picture in one sentence, please. "
    "It doesn't show text; it's a drawing we've seen before.\n"
)


def token_id(token: str, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> int:
    return TRAINED + special_tokens.index(token)


def special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def write_tokenizer(
    folder: Path,
    split: str = QWEN2_SPLIT,
    tokenizer_class: str = "Qwen2Tokenizer",
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    eos: str = "<|im_end|>",
    chat_template: str = CHAT_TEMPLATE,
    normalised: bool = True,
) -> None:
    """tokenizer.json, with Qwen's special tokens and NFC by default; its configuration with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    if normalised:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    train_byte_level(tokenizer, split)
    tokenizer.add_special_tokens([special(token) for token in special_tokens])
    assert tokenizer.token_to_id(special_tokens[0]) == TRAINED
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": tokenizer_class,
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": eos,
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "added_tokens_decoder": {
                str(TRAINED + i): {"content": token, **FLAGS} for i, token in enumerate(special_tokens)
            },
            "chat_template": chat_template,
        },
    )


def train_byte_level(tokenizer: Tokenizer, split: str, special_tokens: Sequence[str] = ()) -> None:
    """Learns TRAINED tokens from the training text, `special_tokens` first."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[special(token) for token in special_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)


def add_tokens(folder: Path, tokens: Sequence[str], chat_template: str, plain: Sequence[str] = ()) -> None:
    """Appends special tokens, then plain ones, to a written tokenizer, and changes its chat template."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([special(token) for token in tokens])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.save(str(path))
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    for token in (*tokens, *plain):
        added = {"content": token, **FLAGS, "special": token in tokens}
        config["added_tokens_decoder"][str(tokenizer.token_to_id(token))] = added
    config["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", config)
