"""A checkpoint's tokenizer in transformers, without any code that is published with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin

from mode_gguf.architectures import ModelFamily
from mode_gguf.chat_templates.sources import chat_templates
from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.checkpoint.side_files import unmarked
from mode_gguf.errors import InputError, foreign_errors
from mode_gguf.forward.model_config import model_config


def open_tokenizer(checkpoint: Checkpoint, family: ModelFamily) -> Any:
    """The tokenizer of `checkpoint`, with the chat template that the GGUF file has, too (`chat_templates`).

    `own_chat_template` is the one that transformers has read for it.

    Raises:
        InputError: it cannot be read.
    """
    folder = checkpoint.path
    templates = chat_templates(folder)
    with foreign_errors(f"{folder}: the tokenizer cannot be read", "use the one published with these weights"):
        tokenizer = _opened(checkpoint, family)
    tokenizer.own_chat_template = tokenizer.chat_template
    tokenizer.chat_template = templates.default
    return tokenizer


def check_tokens(checkpoint: Checkpoint, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Refuse a tokenizer whose ids stand for other tokens in transformers than in the GGUF file.

    Args:
        tokens: of the file, by id; ids that transformers has no token for are not compared.

    Raises:
        InputError: an id is another token's.
    """
    folder = checkpoint.path
    with foreign_errors(f"{folder}: the tokenizer's vocabulary cannot be read"):
        ids: dict[str, int] = tokenizer.get_vocab()
    for token, number in ids.items():
        if number < len(tokens) and tokens[number] != token:
            raise InputError(
                f"{folder}: transformers reads token {number} as {token!r:.100}, and its files name it "
                f"{tokens[number]!r:.100}; use the tokenizer published with these weights"
            )


def _opened(checkpoint: Checkpoint, family: ModelFamily) -> Any:
    folder = checkpoint.path
    if not tiktoken_model.has_tiktoken_model(folder):
        config = model_config(checkpoint, family)
        with unmarked(folder) as readable:
            return AutoTokenizer.from_pretrained(readable, config=config, trust_remote_code=False)
    settings = read_json(folder / "tokenizer_config.json")
    named = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if settings.get(key)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tiktoken_model.tokenizer_json(folder))),
        clean_up_tokenization_spaces=False,
        **{key: token["content"] if isinstance(token, dict) else token for key, token in named.items()},
    )


def processor_chat_template(folder: Path) -> str | None:
    """The chat template that a processor of transformers would take from a checkpoint's folder; None for none."""
    config = folder / "processor_config.json"
    if config.exists() and "audio_tokenizer" in read_json(config):
        return None  # reading it would load another model
    with foreign_errors(f"{folder}: the processor's configuration cannot be read"):
        settings, _ = ProcessorMixin.get_processor_dict(folder)
    template = settings.get("chat_template")
    template = template.get("default") if isinstance(template, dict) else template
    return template if isinstance(template, str) else None
