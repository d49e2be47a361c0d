"""How llama.cpp's tensors differ from what checkpoints store: written down a second time, for the tests.

Every function takes the checkpoint's tensor and returns the GGUF tensor's values.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from tests.families.pico import gemma4_moe as gemma4
from tests.families.pico import kimi, mistral4, qwen3_5_moe
from tests.families.pico.weights import LatentAttention

Conversion: TypeAlias = Callable[[np.ndarray], np.ndarray]

FRAMES: Mapping[str, Conversion] = {
    r"v\.patch_embd\.weight": lambda kernel: kernel[:, :, 0],
    r"v\.patch_embd\.weight\.1": lambda kernel: kernel[:, :, 1],
}
"""A convolution over two frames as one for each."""


def absorbed(sizes: LatentAttention) -> dict[str, Conversion]:
    """Latent attention's kv_b_proj by heads: keys transposed, values as they are."""

    def by_head(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(sizes.heads, sizes.nope + sizes.value, sizes.latent)

    return {
        r"blk\.\d+\.attn_k_b\.weight": lambda matrix: by_head(matrix)[:, : sizes.nope].swapaxes(1, 2),
        r"blk\.\d+\.attn_v_b\.weight": lambda matrix: by_head(matrix)[:, sizes.nope :],
    }


def tiled(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Value heads along the first dimension, from `of key head 0 ..., of key head 1 ...` to `first of each, ...`."""
    each = qwen3_5_moe.VALUE_HEADS // qwen3_5_moe.KEY_HEADS
    heads = array.reshape(qwen3_5_moe.KEY_HEADS, each, head_dim, *array.shape[1:])
    return np.concatenate([heads[:, i].reshape(-1, *array.shape[1:]) for i in range(each)])


def channels(array: np.ndarray) -> np.ndarray:
    """Queries and keys as they are, values tiled."""
    unmoved = 2 * qwen3_5_moe.KEY_HEADS * qwen3_5_moe.LINEAR_DIM
    return np.concatenate([array[:unmoved], tiled(array[unmoved:], qwen3_5_moe.LINEAR_DIM)])


LINEAR_ATTENTION: Mapping[str, Conversion] = {
    r"blk\.\d+\.attn_qkv\.weight": channels,
    r"blk\.\d+\.attn_gate\.weight": lambda matrix: tiled(matrix, qwen3_5_moe.LINEAR_DIM),
    r"blk\.\d+\.ssm_conv1d\.weight": lambda kernel: channels(kernel[:, 0]),
    r"blk\.\d+\.ssm_(alpha|beta)\.weight": lambda matrix: tiled(matrix, 1),
    r"blk\.\d+\.ssm_dt\.bias": lambda bias: tiled(bias, 1),
    r"blk\.\d+\.ssm_a": lambda log: -np.exp(tiled(log, 1).astype(np.float64)).astype(np.float32),
    r"blk\.\d+\.ssm_out\.weight": lambda matrix: tiled(matrix.T, qwen3_5_moe.LINEAR_DIM).T,
    # RMSNorms that add 1 themselves.
    r"(blk\.\d+\.(attn|post_attention|attn_q|attn_k)|output)_norm\.weight": lambda gains: gains + 1,
}


def gemma_patches(matrix: np.ndarray) -> np.ndarray:
    """From the pixels of a patch in a row to (channels, rows, columns)."""
    patches = matrix.reshape(gemma4.VISION_HIDDEN, gemma4.PATCH, gemma4.PATCH, 3)
    return np.ascontiguousarray(patches.transpose(0, 3, 1, 2))


def neighbours(array: np.ndarray) -> np.ndarray:
    """Pixtral's queries and keys: from the two halves of a head to pairs of neighbours."""
    halves = array.reshape(mistral4.VISION_HEADS, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def columns_then_rows(array: np.ndarray) -> np.ndarray:
    """MoonViT's queries or keys: first a head's pairs for columns, then those for rows."""
    return array.reshape(kimi.VISION_HEADS, -1, *array.shape[1:])[:, _turned()].reshape(array.shape)


def columns_with_rows(array: np.ndarray) -> np.ndarray:
    """The inverse: the checkpoint's order, which the stock converter keeps."""
    return array.reshape(kimi.VISION_HEADS, -1, *array.shape[1:])[:, np.argsort(_turned())].reshape(array.shape)


def _turned() -> np.ndarray:
    pairs = np.arange(kimi.VISION_HIDDEN // kimi.VISION_HEADS).reshape(-1, 2)
    return np.concatenate([pairs[0::2].ravel(), pairs[1::2].ravel()])


def third(array: np.ndarray, place: int) -> np.ndarray:
    """Queries, keys or values of the three in one."""
    parts: list[np.ndarray] = np.split(array, 3)
    return parts[place]


def moon_vit(*, apart: bool) -> dict[str, Conversion]:
    """Queries and keys, in tensors of their own or in one with the values."""

    def together(array: np.ndarray) -> np.ndarray:
        q, k, v = np.split(array, 3)
        return np.concatenate([columns_then_rows(q), columns_then_rows(k), v])

    if not apart:
        return {r"v\.blk\.\d+\.attn_qkv\..*": together}
    return {
        r"v\.blk\.\d+\.attn_q\..*": lambda array: columns_then_rows(third(array, 0)),
        r"v\.blk\.\d+\.attn_k\..*": lambda array: columns_then_rows(third(array, 1)),
        r"v\.blk\.\d+\.attn_v\..*": lambda array: third(array, 2),
        r"v\.position_embd\.weight": lambda table: table.reshape(kimi.POSITIONS**2, kimi.VISION_HIDDEN),
    }


def class_token_last(table: np.ndarray) -> np.ndarray:
    """Positions of InternVL's tower, whose checkpoint has the class token's first."""
    return np.roll(table, -1, axis=1)


def class_token_first(table: np.ndarray) -> np.ndarray:
    """The order that the stock converter keeps."""
    return np.roll(table, 1, axis=1)
