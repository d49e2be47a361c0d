"""Rotary positions: their settings as transformers reads them, and the keys with which llama.cpp computes the same.

config.json has them under `rope_scaling` beside `rope_theta` (transformers 4) or all under `rope_parameters`
(transformers 5), and their kind as `type` or `rope_type`. Of the scalings beyond the trained context, llama.cpp's
decoders run linear interpolation and YaRN. Dynamic NTK leaves positions below `max_position_embeddings` as they are,
and that is where a file's context ends.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

from gguf import Keys, RopeScalingType

from mode_gguf.architectures.common_keys import MetadataValue
from mode_gguf.architectures.hparams import NOTHING, Hparams

log = logging.getLogger(__name__)

DEFAULT, DYNAMIC, LINEAR, YARN = "default", "dynamic", "linear", "yarn"
AXIAL = "axial"
SCALINGS: Final = (DEFAULT, DYNAMIC, LINEAR, YARN)
"""Kinds that llama.cpp's decoders run where nothing else is said."""

YARN_BETAS: Final[Mapping[str, float]] = {"beta_fast": 32.0, "beta_slow": 1.0}
"""transformers' defaults, which it takes for null and 0, too; llama.cpp's only ones for the readers of our files."""

LARGEST_BASE, LARGEST_CONTEXT = 1e30, 2**31 - 1
"""What the types of llama.cpp hold."""

PER_EFOLD: Final = 0.1
"""What YaRN adds to the length of queries and keys for every e-fold of the context."""

RATIO_OF_ITS_OWN: Final = "deepseek2"
"""The reader whose own factor of rotated channels is 1 where it has a multiplier (see `latent_scaling_keys`)."""

_OLD, _NEW = "rope_scaling", "rope_parameters"
_TRAINED = "original_max_position_embeddings"
_BESIDE = ("rope_theta", "partial_rotary_factor")
_WAY_OUT = (
    "use the checkpoint without this scaling, or with one of these; the file would not compute what the checkpoint does"
)


def rope_hparams(text: Hparams, defaults: Mapping[str, Any] = NOTHING) -> Hparams:
    """Rotary settings of a text model with one kind of attention, put together as transformers does.

    Where there are both, `rope_scaling` counts alone. What is in it counts more than what is beside it, except for the
    trained context of YaRN, which is `max_position_embeddings` by default.

    Args:
        defaults: transformers' values of what config.json may lack.

    Raises:
        InputError: they are no object.
    """
    within = _within(text)
    beside = {name: text.get(name) for name in _BESIDE if text.has(name)}
    values = {**defaults, **beside, **within, "rope_type": within.get("rope_type", within.get("type", DEFAULT))}
    rope = replace(text, values=values)
    if values["rope_type"] == YARN:
        values[_TRAINED] = text.get(_TRAINED, within.get(_TRAINED, text.get("max_position_embeddings")))
        if "factor" in values and values["factor"] is None and rope.int(_TRAINED) > 0:
            values["factor"] = text.int("max_position_embeddings") / rope.int(_TRAINED)
    return rope


def check_rope(text: Hparams, rope: Hparams, kinds: Sequence[str] = SCALINGS) -> None:
    """Refuse positions that llama.cpp computes otherwise; say where config.json contradicts itself.

    Args:
        rope: `rope_hparams` of `text`.
        kinds: those that llama.cpp's reader of the model runs.

    Raises:
        InputError: another kind, settings without a kind, or one that llama.cpp has no place for.
    """
    kind, within = rope.get("rope_type"), _within(text)
    if kind not in kinds:
        way_out = f"llama.cpp's {text.reader} runs no other scaling of positions; {_WAY_OUT}"
        rope.refuse("rope_type", " or ".join(map(repr, kinds)), way_out)
    if not {"rope_type", "type"} & within.keys() and within.get("factor") not in (None, 1):
        rope.refuse("factor", "a rope_type beside it: transformers scales nothing without", "add the model's rope_type")
    nested = next((name for name, value in within.items() if isinstance(value, dict)), None)
    if nested is not None:
        rope.refuse(nested, "a plain setting: this model has one kind of attention only")
    if text.has("mrope_section") and text.get("mrope_section") != rope.get("mrope_section"):
        text.refuse("mrope_section", f"it within {_OLD} or {_NEW}, where transformers looks for it")
    if not 1.0 < rope.float("rope_theta") < LARGEST_BASE:
        rope.refuse("rope_theta", f"a number from 1 to {LARGEST_BASE:g}")
    if kind in (LINEAR, YARN):
        _check_lengths(rope)
    if kind == YARN:
        _check_yarn(rope)
    for contradiction in _contradictions(text, within):
        _say_once(f"{text.file}: {contradiction}")


def check_whole_heads(rope: Hparams) -> None:
    """Refuse a share of channels to rotate where llama.cpp, and transformers by default, rotate all of a head's."""
    rope.expect("partial_rotary_factor", 1.0, "rotates whole heads")


def check_tower(vision: Hparams, theta: float) -> None:
    """Refuse rotary positions of a vision tower but the ones that llama.cpp computes, rows and columns apart.

    Args:
        theta: the base that llama.cpp has for this projector.
    """
    rope = rope_hparams(vision, {"rope_theta": theta})
    if rope.get("rope_type") != DEFAULT:  # which transformers takes for the same in towers
        rope.expect("rope_type", AXIAL, "rotates rows and columns apart")
    rope.expect("rope_theta", theta, "has this base")


def mrope_sections(rope: Hparams) -> list[int]:
    """Channel pairs for time, row and column, and a fourth that llama.cpp reads and no model here has."""
    return [*rope.list("mrope_section"), 0, 0, 0, 0][:4]


def check_sections(rope: Hparams, rotated: int, *, interleaved: bool = False) -> None:
    """Refuse sections other than up to three with as many pairs as are rotated.

    Args:
        rotated: channels of a head.
        interleaved: whether time, row and column take turns: then there may be more pairs in the sections, but
            llama.cpp begins again behind the last.
    """
    sections, pairs = rope.list("mrope_section"), rotated // 2
    numbers = all(isinstance(pairs, int) for pairs in sections)
    if len(sections) > 3 or not numbers or not (sum(sections) == pairs or (interleaved and sum(sections) > pairs)):
        rope.refuse("mrope_section", f"up to three sections with {pairs} pairs in all, as many as are rotated")


def amplitude(rope: Hparams) -> float:
    """The factor of YaRN's cosines and sines (`_compute_yarn_parameters` of transformers)."""
    if rope.has("attention_factor"):
        return rope.float("attention_factor")
    factor = rope.float("factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, rope.float("mscale")) / _mscale(factor, rope.float("mscale_all_dim"))
    return _mscale(factor)


def scaling_keys(rope: Hparams) -> dict[str, MetadataValue]:
    """Scaling of positions beyond the trained context; nothing where there is none.

    llama.cpp multiplies cosines and sines with YaRN's own amplitude and with `attn_factor`; it reads
    `yarn_attn_factor` but puts its own value in its place.
    """
    if rope.get("rope_type") == LINEAR:
        return _linear_keys(rope)
    if rope.get("rope_type") != YARN:
        return {}
    return {**_yarn_keys(rope), **_attn_factor(amplitude(rope), _mscale(rope.float("factor")))}


def latent_scaling_keys(rope: Hparams) -> dict[str, MetadataValue]:
    """The same for latent attention, where rotated channels and whole products have a factor each.

    With f the scaling factor and m the multiplier, llama.cpp's `deepseek2` rotates with an amplitude A and scales
    products by (B (1 + 0.1 m ln f))^2: B is A for YaRN and 1 + 0.1 ln f for linear scaling. transformers has
    `amplitude` and (1 + 0.1 mscale_all_dim ln f)^2; so m makes the products right, and `attn_factor` makes A right.

    Raises:
        InputError: a factor for which llama.cpp has no place.
    """
    kind, all_channels = rope.get("rope_type"), rope.float("mscale_all_dim") if rope.get("mscale_all_dim") else 0.0
    if kind == DYNAMIC and all_channels:
        rope.refuse("mscale_all_dim", f"null: llama.cpp's {rope.reader} has it with yarn and linear scaling only")
    if kind in (DEFAULT, DYNAMIC):
        return {}
    factor = rope.float("factor")
    growth, rotated = PER_EFOLD * math.log(factor), amplitude(rope) if kind == YARN else 1.0
    if kind == YARN and rotated == 1.0:
        multiplier = all_channels
    else:
        product = _mscale(factor, all_channels) / (rotated if kind == YARN else 1.0 + growth)
        if growth == 0.0 and product != 1.0:
            rope.refuse("attention_factor", "null or 1 with a factor of 1")
        multiplier = (product - 1.0) / growth if growth else 0.0
    # A tenth: llama.cpp's loader of DeepSeek models divides by 0.1.
    keys = {Keys.Rope.SCALING_YARN_LOG_MUL: PER_EFOLD * multiplier}
    if kind == LINEAR:
        return {**_linear_keys(rope), **keys}
    own = _mscale(factor)
    if multiplier:
        own = 1.0 if rope.reader == RATIO_OF_ITS_OWN else own / _mscale(factor, multiplier)
    return {**_yarn_keys(rope), **keys, **_attn_factor(rotated, own)}


def _within(text: Hparams) -> Mapping[str, Any]:
    """The object of rotary settings that transformers takes; empty where there is none."""
    name = _OLD if text.get(_OLD) else _NEW
    return text.read(dict, name) if text.get(name) else {}


def _linear_keys(rope: Hparams) -> dict[str, MetadataValue]:
    return {Keys.Rope.SCALING_TYPE: RopeScalingType.LINEAR.value, Keys.Rope.SCALING_FACTOR: rope.float("factor")}


def _yarn_keys(rope: Hparams) -> dict[str, MetadataValue]:
    return {
        Keys.Rope.SCALING_TYPE: RopeScalingType.YARN.value,
        Keys.Rope.SCALING_FACTOR: rope.float("factor"),
        Keys.Rope.SCALING_ORIG_CTX_LEN: rope.int(_TRAINED),
        Keys.Rope.SCALING_YARN_BETA_FAST: _beta(rope, "beta_fast"),
        Keys.Rope.SCALING_YARN_BETA_SLOW: _beta(rope, "beta_slow"),
    }


def _attn_factor(wanted: float, own: float) -> dict[str, MetadataValue]:
    """What llama.cpp's own amplitude is multiplied with to be the one that is wanted, where it is another."""
    return {} if math.isclose(wanted, own, rel_tol=1e-9) else {Keys.Rope.SCALING_ATTN_FACTOR: wanted / own}


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 1.0 + PER_EFOLD * weight * math.log(factor)


def _beta(rope: Hparams, name: str) -> float:
    return rope.float(name) if rope.get(name) else YARN_BETAS[name]


def _check_lengths(rope: Hparams) -> None:
    if not 1.0 <= rope.float("factor") < LARGEST_CONTEXT:
        rope.refuse("factor", f"a number from 1 to {LARGEST_CONTEXT}")
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name) and not 0.0 < rope.float(name) < math.inf:
            rope.refuse(name, "null or a positive number")


def _check_yarn(rope: Hparams) -> None:
    if not 0 < rope.int(_TRAINED) < LARGEST_CONTEXT:
        rope.refuse(_TRAINED, f"a number from 1 to {LARGEST_CONTEXT}")
    for name, value in YARN_BETAS.items():
        rope.require(name, _beta(rope, name), value, "has this one, whatever a file says")
    if not 0.0 < amplitude(rope) < math.inf:
        rope.refuse("attention_factor", "a positive number")
    rope.expect("truncate", True, "rounds the range of channels that YaRN corrects")


def _contradictions(text: Hparams, within: Mapping[str, Any]) -> Iterator[str]:
    """Settings that config.json has twice and differently, and which of them transformers takes, as we do."""
    old, new = text.get(_OLD), text.get(_NEW)
    if old and new and old != new:
        yield f"{_OLD} and {_NEW} differ; as in transformers, {_OLD} counts"
    for name in (*_BESIDE, _TRAINED):
        if text.has(name) and within.get(name, text.get(name)) != text.get(name):
            taken = text.get(name) if name == _TRAINED else within[name]
            places = f"{text.get(name)!r}, and {within[name]!r} within {_OLD if old else _NEW}"
            yield f"{name} is {places}; as in transformers, {taken!r} counts"


@cache
def _say_once(message: str) -> None:
    """A warning: families are checked again and again."""
    log.warning("%s", message)
