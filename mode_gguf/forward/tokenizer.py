"""A checkpoint's tokenizer in transformers, without any code that is published with it."""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mode_gguf.architectures import ModelFamily
from mode_gguf.checkpoint import tiktoken_model
from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.forward.model_config import model_config


def open_tokenizer(checkpoint: Checkpoint, family: ModelFamily) -> Any:
    """The tokenizer of `checkpoint`.

    Raises:
        OSError, ValueError, ImportError: transformers cannot read it.
        InputError: as above, of a `tiktoken.model`.
    """
    folder = checkpoint.path
    if not tiktoken_model.has_tiktoken_model(folder):
        return AutoTokenizer.from_pretrained(folder, config=model_config(checkpoint, family), trust_remote_code=False)
    config, template = read_json(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    named = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tiktoken_model.tokenizer_json(folder))),
        chat_template=template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **{key: token["content"] if isinstance(token, dict) else token for key, token in named.items()},
    )
