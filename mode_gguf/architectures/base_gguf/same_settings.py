"""Comparison of a base GGUF's hyperparameters and tokens with the checkpoint's."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeGuard

from gguf import Keys

from mode_gguf.architectures.base_gguf.files import BaseGguf
from mode_gguf.architectures.base_gguf.other_model import other_model
from mode_gguf.architectures.hparams import EXPERT_COUNTS
from mode_gguf.checkpoint.folder import Checkpoint, read_json

_EXPERT_COUNTS: Final = (*EXPERT_COUNTS, "moe_num_experts")
_EXPERTS_USED: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")
_SCALED_ROTARY: Final = ("linear", "yarn")
"""Types of rotary scaling that a file has as keys; others are in tensors, or in none."""


def check_settings(checkpoint: Checkpoint, base: BaseGguf) -> None:
    """Refuse a base whose sizes, routing, rotary settings or tokens are not the checkpoint's.

    Raises:
        InputError: one of them differs; the message says what is there and what is here.
    """
    config = _text_config(checkpoint)
    predicting = int(base.setting(Keys.LLM.NEXTN_PREDICT_LAYERS) or 0)
    blocks = base.setting(Keys.LLM.BLOCK_COUNT)
    rotary = _rotary(config)
    pairs = (
        ("layers", config.get("num_hidden_layers"), blocks - predicting if isinstance(blocks, int) else None),
        ("a hidden size of", config.get("hidden_size"), base.setting(Keys.LLM.EMBEDDING_LENGTH)),
        ("experts per layer:", _first(config, _EXPERT_COUNTS), base.setting(Keys.LLM.EXPERT_COUNT)),
        ("experts per token:", _first(config, _EXPERTS_USED), base.setting(Keys.LLM.EXPERT_USED_COUNT)),
        ("rope_theta", rotary.get("rope_theta"), base.setting(Keys.Rope.FREQ_BASE)),
        ("rope_scaling factor", *_factors(rotary, base)),
    )
    for what, wanted, found in pairs:
        if _is_number(wanted) and _is_number(found) and not math.isclose(wanted, found, rel_tol=1e-5):
            other_model(checkpoint, base, f"{what} {found:g} there, {wanted:g} here")
    _check_tokens(checkpoint, base)


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json merged with its section on the text model, wherever that is."""
    settings = dict(checkpoint.config)
    for part in ("thinker_config", "text_config", "llm_config", "language_config"):
        nested = settings.get(part)
        if isinstance(nested, dict):
            settings |= nested
    return settings


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as older and newer configurations have them; of one kind of layers alone, none."""
    found: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if isinstance(section, dict):
            if any(isinstance(value, dict) for value in section.values()):
                return {}
            found |= section
    return found


def _factors(rotary: Mapping[str, Any], base: BaseGguf) -> tuple[float | None, float | None]:
    """Factors of rotary scaling here and there, 1 for none; None where one of them is of a type without a key."""
    kind = rotary.get("rope_type", rotary.get("type"))
    there = base.setting(Keys.Rope.SCALING_TYPE)
    if not rotary or kind not in (None, "default", "mrope", *_SCALED_ROTARY):
        return None, None
    if there not in (None, "none", *_SCALED_ROTARY):
        return None, None
    here = rotary.get("factor") if kind in _SCALED_ROTARY else 1.0
    return here, base.setting(Keys.Rope.SCALING_FACTOR) if there in _SCALED_ROTARY else 1.0


def _first(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_tokens(checkpoint: Checkpoint, base: BaseGguf) -> None:
    """Special tokens that tokenizer.json adds have the same text there; converters may respell all others."""
    file, tokens = checkpoint.path / "tokenizer.json", base.text.metadata.get(Keys.Tokenizer.LIST)
    if not isinstance(tokens, list) or not file.is_file():
        return
    added = read_json(file).get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if not (isinstance(token, dict) and token.get("special") is True):
            continue
        number, text = token.get("id"), token.get("content")
        if not isinstance(number, int) or not isinstance(text, str) or text != text.strip() or not text.isascii():
            continue
        there = tokens[number] if 0 <= number < len(tokens) else None
        if there != text:
            what = f"token {number} is {json.dumps(there)} there, {json.dumps(text)} here"
            other_model(checkpoint, base, what)
