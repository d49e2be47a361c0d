"""Settings of a model as transformers resolves them, beside those that its files get.

Configurations have settings under old and new names, at two levels, and twice; transformers has defaults for what is
missing. Whatever we make of a configuration, calibration runs what transformers makes of it: both must be the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from gguf import Keys
from transformers import PreTrainedConfig

from mode_gguf.architectures import ModelFamily
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

_LLM, _ATTENTION, _SSM = Keys.LLM, Keys.Attention, Keys.SSM
SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    _LLM.BLOCK_COUNT: ("num_hidden_layers",),
    _LLM.CONTEXT_LENGTH: ("max_position_embeddings",),
    _LLM.EMBEDDING_LENGTH: ("hidden_size",),
    _LLM.LEADING_DENSE_BLOCK_COUNT: ("first_k_dense_replace",),
    _LLM.EXPERT_COUNT: ("num_experts", "n_routed_experts"),
    _LLM.EXPERT_USED_COUNT: ("num_experts_per_tok", "top_k_experts"),
    _LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size",),
    _LLM.EXPERT_SHARED_COUNT: ("n_shared_experts",),
    _LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_expert_intermediate_size",),
    _LLM.EXPERT_GROUP_COUNT: ("n_group",),
    _LLM.EXPERT_GROUP_USED_COUNT: ("topk_group",),
    _LLM.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor",),
    _LLM.EXPERT_WEIGHTS_NORM: ("norm_topk_prob",),
    _LLM.FINAL_LOGIT_SOFTCAPPING: ("final_logit_softcapping",),
    _ATTENTION.HEAD_COUNT: ("num_attention_heads",),
    _ATTENTION.LAYERNORM_RMS_EPS: ("rms_norm_eps",),
    _ATTENTION.KV_LORA_RANK: ("kv_lora_rank",),
    _ATTENTION.VALUE_LENGTH_MLA: ("v_head_dim",),
    _ATTENTION.SLIDING_WINDOW: ("sliding_window",),
    _SSM.CONV_KERNEL: ("linear_conv_kernel_dim",),
    _SSM.STATE_SIZE: ("linear_key_head_dim",),
    _SSM.GROUP_COUNT: ("linear_num_key_heads",),
    _SSM.TIME_STEP_RANK: ("linear_num_value_heads",),
}
"""transformers' names by GGUF key, of which a class of configurations declares one at most."""

TOWER: Final[Mapping[str, tuple[str, ...]]] = {
    Keys.ClipVision.BLOCK_COUNT: ("depth", "num_hidden_layers"),
    Keys.ClipVision.EMBEDDING_LENGTH: ("hidden_size",),
    Keys.ClipVision.FEED_FORWARD_LENGTH: ("intermediate_size",),
    Keys.ClipVision.PATCH_SIZE: ("patch_size",),
    Keys.ClipVision.SPATIAL_MERGE_SIZE: ("spatial_merge_size",),
    Keys.ClipVision.Attention.HEAD_COUNT: ("num_heads", "num_attention_heads"),
    Keys.ClipVision.Attention.LAYERNORM_EPS: ("layer_norm_eps", "rms_norm_eps"),
}
"""The same of the vision tower."""

ROTARY: Final[Mapping[str, str]] = {
    Keys.Rope.FREQ_BASE: "rope_theta",
    Keys.Rope.SCALING_TYPE: "rope_type",
    Keys.Rope.SCALING_FACTOR: "factor",
}
"""The same of rotary settings of the text model, those of full attention where kinds of layers differ."""


def check_resolved(checkpoint: Checkpoint, family: ModelFamily, config: PreTrainedConfig) -> None:
    """Refuse a configuration that transformers reads otherwise than it is written into the two files.

    Args:
        config: transformers' of the whole model.

    Raises:
        InputError: a setting differs.
    """
    text = config.text_config
    rotary = getattr(text, "rope_parameters", None) or {}
    rotary = rotary.get("full_attention", rotary)
    written = family.text_metadata(checkpoint)
    for key, name in ROTARY.items():
        if name in rotary:
            _compare(checkpoint, name, written.get(key.format(arch=family.gguf_arch)), rotary[name])
    for key, names in SETTINGS.items():
        for name in declared_names(text, names):
            _compare(checkpoint, name, written.get(key.format(arch=family.gguf_arch)), getattr(text, name))
    tower, written = config.vision_config, family.projector_metadata(checkpoint)
    for key, names in TOWER.items():
        for name in declared_names(tower, names):
            _compare(checkpoint, f"vision {name}", written.get(key), getattr(tower, name))


def declared_names(part: PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """Those of `names` that a class of configurations declares: others in config.json count for nothing."""
    declared = {field.name for field in fields(part)}
    return [name for name in names if name in declared]


def _compare(checkpoint: Checkpoint, name: str, written: Any, resolved: Any) -> None:
    """Refuse what is written otherwise than it is resolved; None is not written."""
    if written is not None and not _same(written, resolved):
        raise InputError(
            f"{checkpoint.path / 'config.json'}: {name} would be {written!r} in the file, and transformers makes it "
            f"{resolved!r}; remove other names and second values of it from the configuration"
        )


def _same(written: Any, resolved: Any) -> bool:
    if isinstance(written, float) and isinstance(resolved, float | int):
        return math.isclose(written, resolved, rel_tol=1e-6)
    if isinstance(resolved, list | tuple):  # of rows and columns
        return all(side == written for side in resolved)
    return bool(written == resolved)
