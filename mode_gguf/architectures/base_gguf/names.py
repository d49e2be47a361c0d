"""GGUF's names for a checkpoint's tensors, by gguf's own tables over all architectures."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Final

import gguf
from gguf import Keys

from mode_gguf.architectures.base_gguf.files import BaseGguf

_IN_LAYER: Final = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(.+)")
_NON_TEXT_NAMES: Final = ("vision", "visual", "audio", "projector", "mm_", "connector", "vit", "vq")
"""Parts of the names of tensors beside the text model, whose layers are numbered, too."""
_SUFFIXES: Final = (".weight", ".bias")
_MERGED: Final = re.compile(r"\.(qkv_proj|qkv|Wqkv|query_key_value|c_attn|kv_b_proj)\.(weight|bias)$")
_RENAMED: Final = (("e_score_correction_bias", "e_score_correction.bias"), (".dt_bias", ".dt_proj.bias"))
"""Parameters that converters give a suffix before they look them up."""


def gguf_name(base: BaseGguf, source: str) -> str | None:
    """GGUF's name for a checkpoint tensor of the text model; None if the tables have none."""
    if not is_text(source):
        return None
    table = _name_table(base.architecture, int(base.setting(Keys.LLM.BLOCK_COUNT) or 0))
    if table is None:
        return None
    for parameter, with_suffix in _RENAMED:
        source = source.replace(parameter, with_suffix)
    inside = _IN_LAYER.match(source)
    forms = [source, source.replace("language_model.", ""), source.replace("model.language_model.", "model.")]
    forms.append(f"model.layers.{inside[1]}.{inside[2]}" if inside else "model." + source.rpartition("model.")[2])
    names: Iterator[str | None] = (table.get_name(form, _SUFFIXES) for form in forms)
    return next((name for name in names if name is not None), None) or _merged_name(source)


def _merged_name(source: str) -> str | None:
    """The name of a matrix that the architecture's table has in parts alone, as other architectures call it."""
    found = _MERGED.search(source)
    layer = layer_of(source)
    if found is None or layer is None:
        return None
    return f"blk.{layer}.{'attn_kv_b' if found[1] == 'kv_b_proj' else 'attn_qkv'}.{found[2]}"


def is_text(source: str) -> bool:
    """Whether a checkpoint tensor is of the text model, by its name."""
    return not any(part in source for part in _NON_TEXT_NAMES)


def layer_of(source: str) -> int | None:
    """The text model's layer that a checkpoint tensor belongs to; None outside of them."""
    inside = _IN_LAYER.match(source)
    return int(inside[1]) if inside and is_text(source) else None


@cache
def _name_table(architecture: str, blocks: int) -> gguf.TensorNameMap | None:
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], blocks) if architecture in known else None
