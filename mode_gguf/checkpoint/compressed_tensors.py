"""Matrices that compressed-tensors has packed in four bits, as Kimi K2.5's experts are published.

Of a matrix W there are `W_packed`, eight 4-bit numbers per int32 with the first in the lowest bits, `W_scale`, one per
group of a row's neighbouring numbers, and `W_shape`. A number n stands for (n - 8) * scale, exact in float32.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

PER_INT32 = 8
ZERO = 8
_SUFFIXES = ("_packed", "_scale", "_shape")

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


def is_supported(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config says that weights are packed so, and nothing else is done to them."""
    groups = config.get("config_groups")
    if config.get("quant_method") != METHOD or config.get("format") != FORMAT or not isinstance(groups, dict):
        return False
    return all(isinstance(group, dict) and _is_plain(group.get("weights")) for group in groups.values())


def _is_plain(weights: Any) -> bool:
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return isinstance(weights, dict) and wanted.items() <= weights.items() and not weights.get("actorder")


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
