"""FP8 weights (E4M3) with scales, as some models are published: decoded while they are read.

A tensor `x` has its scales in `x_scale_inv`, or in `x_scale` where compressed-tensors wrote it: one, one per leading
index, or one per block of rows and columns. Despite the former name, weights are multiplied with them.
"""

from collections.abc import Sequence

import numpy as np

DTYPE = "F8_E4M3"
"""safetensors' name: a sign, four bits of exponent, three of fraction, no infinity."""

METHOD = "fp8"
"""`quant_method` in config.json."""

SCALE = "_scale_inv"
"""Suffix of the name of a tensor of scales."""

ACTIVATION_SCALE = "activation_scale"
"""Suffix of the names of tensors that only arithmetic in FP8 needs."""


SCALE_DTYPES = ("F32", "BF16", "F16", "F64")
"""Types of scales."""


def _values() -> np.ndarray:
    """The 256 values, float32 by bit pattern."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    size[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -size, size).astype(np.float32)


_VALUES = _values()


def scaling_blocks(shape: Sequence[int], scales: Sequence[int], block: Sequence[int] | None) -> tuple[int, ...] | None:
    """Size in each dimension of the block that shares a scale; None where the shapes do not belong together.

    Args:
        block: of the last two dimensions, as `weight_block_size` in config.json gives it.
    """
    if len(scales) > len(shape):
        return None
    scales = (*scales, *[1] * (len(shape) - len(scales)))
    sizes = [*(1 for _ in shape[:-2]), *block] if block is not None and len(shape) >= 2 else None
    shared = []
    for axis, (n, n_scales) in enumerate(zip(shape, scales, strict=True)):
        if sizes is not None and n_scales == -(-n // sizes[axis]):
            shared.append(sizes[axis])
        elif n_scales and n % n_scales == 0:
            shared.append(max(n // n_scales, 1))
        else:
            return None
    return tuple(shared)


def decoded(
    raw: np.ndarray,
    scales: np.ndarray,
    blocks: Sequence[int],
    shape: Sequence[int],
    index: Sequence[int | slice | np.ndarray],
) -> np.ndarray:
    """Weights, float32.

    Args:
        raw: bit patterns of `tensor[index]`, uint8.
        scales: of the whole tensor, float32; dimensions of size 1 may be missing at the end.
        blocks: as `scaling_blocks` gives them.
        shape: of the whole tensor.
        index: the first dimensions' part of it, at most one of them an array.
    """
    scales = scales.reshape(*scales.shape, *[1] * (len(shape) - scales.ndim))
    chosen = [np.arange(n)[part] for n, part in zip(shape, (*index, *[slice(None)] * len(shape)), strict=False)]
    places = [np.atleast_1d(part) // size for part, size in zip(chosen, blocks, strict=True)]
    weights: np.ndarray = _VALUES[raw]
    weights *= scales[np.ix_(*places)].reshape([len(part) for part in chosen if part.ndim])
    return weights
