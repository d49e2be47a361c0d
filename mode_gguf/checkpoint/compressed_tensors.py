"""Weights that compressed-tensors has quantized: in FP8, decoded as `fp8` says, or packed in four bits.

The latter is how Kimi K2.5's experts are published. Of a matrix W there are `W_packed`, eight 4-bit numbers per int32
with the first in the lowest bits, `W_scale`, one per group of a row's neighbouring numbers, and `W_shape`. A number n
stands for (n - 8) * scale, exact in float32.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

PER_INT32 = 8
ZERO = 8
_SUFFIXES = ("_packed", "_scale", "_shape")

METHOD = "compressed-tensors"
"""`quant_method` in config.json."""

SCALE = "_scale"
"""Suffix of the name of an FP8 tensor's scales."""

NOT_WEIGHTS = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
"""Endings of the names of scales of activations and of the KV cache, which only arithmetic in FP8 needs."""

_PACKED, _FLOAT = "pack-quantized", ("float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")


def is_supported(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config says that weights are in FP8 or packed as above, and nothing else."""
    sparsity = config.get("sparsity_config")
    dense = not isinstance(sparsity, dict) or sparsity.get("format", "dense") == "dense"
    groups = config.get("config_groups")
    if config.get("quant_method") != METHOD or not dense or not isinstance(groups, dict):
        return False
    blocks = {str(_weights(group).get("block_structure")) for group in groups.values() if _is_fp8(config, group)}
    return len(blocks) < 2 and all(_is_fp8(config, one) or _is_packed(config, one) for one in groups.values())


def block_of(config: Mapping[str, Any]) -> Any:
    """Sizes of the blocks of FP8 weights that share a scale, as a supported quantization_config has them."""
    found = (_weights(group).get("block_structure") for group in config["config_groups"].values())
    return next((block for block in found if block is not None), None)


def described(config: Mapping[str, Any]) -> str:
    """A quantization_config in a few words, for a message."""
    groups = config.get("config_groups")
    weights = [_weights(group) for group in groups.values()] if isinstance(groups, dict) else []
    names = ("num_bits", "type", "strategy", "symmetric", "actorder")
    details = [", ".join(f"{name} {one[name]}" for name in names if one.get(name) is not None) for one in weights]
    return "; ".join(dict.fromkeys((f"{METHOD} {config.get('format')}", *details)))


def _weights(group: Any) -> Mapping[str, Any]:
    weights = group.get("weights") if isinstance(group, dict) else None
    return weights if isinstance(weights, dict) else {}


def _format(config: Mapping[str, Any], group: Any) -> Any:
    own = group.get("format") if isinstance(group, dict) else None
    return own or config.get("format")


def _is_packed(config: Mapping[str, Any], group: Any) -> bool:
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    weights = _weights(group)
    return _format(config, group) == _PACKED and wanted.items() <= weights.items() and not weights.get("actorder")


def _is_fp8(config: Mapping[str, Any], group: Any) -> bool:
    weights = _weights(group)
    return (
        _format(config, group) in _FLOAT
        and {"num_bits": 8, "type": "float"}.items() <= weights.items()
        and weights.get("symmetric", True) is True
        and weights.get("strategy") in _STRATEGIES
        and not weights.get("actorder")
    )


def packed_name(name: str) -> str | None:
    """W for the name of `W_packed`; None for any other."""
    return name.removesuffix(_SUFFIXES[0]) if name.endswith(f".weight{_SUFFIXES[0]}") else None


def part_names(name: str) -> tuple[str, str, str]:
    """Names of the three tensors that W is stored as."""
    packed, scale, shape = (name + suffix for suffix in _SUFFIXES)
    return packed, scale, shape


def unpacked(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows (n, n_in) in float32 from int32 (n, n_in / 8) and float32 scales (n, groups)."""
    shifts = np.arange(0, 32, 32 // PER_INT32, dtype=np.uint32)
    numbers = packed.view(np.uint32)[..., None] >> shifts & np.uint32(15)
    rows = (numbers.astype(np.float32) - ZERO).reshape(*scale.shape, -1)
    weights: np.ndarray = (rows * scale[..., None]).reshape(len(packed), -1)
    return weights
