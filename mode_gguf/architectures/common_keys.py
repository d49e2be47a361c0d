"""GGUF keys and ranges that text models and vision towers have in common, each read in one place.

Keys stand in a file in the order in which a family lists them.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from gguf import Keys

from mode_gguf.architectures.hparams import Hparams, expert_sizes, image_hparams, text_hparams
from mode_gguf.architectures.rules import Ranges, numbered

MetadataValue: TypeAlias = str | bool | int | float | list[str] | list[bool] | list[int] | list[float]
"""A GGUF value: int is stored as uint32, float as float32, and a list of int as an int32 array."""

Metadata: TypeAlias = Mapping[str, MetadataValue]

SIZES: Final = (Keys.LLM.BLOCK_COUNT, Keys.LLM.CONTEXT_LENGTH, Keys.LLM.EMBEDDING_LENGTH)
HEADS: Final = (
    Keys.Attention.HEAD_COUNT,
    Keys.Attention.HEAD_COUNT_KV,
    Keys.Attention.KEY_LENGTH,
    Keys.Attention.VALUE_LENGTH,
)
EXPERTS: Final = (Keys.LLM.EXPERT_COUNT, Keys.LLM.EXPERT_USED_COUNT, Keys.LLM.EXPERT_FEED_FORWARD_LENGTH)


def head_dim(text: Hparams) -> int:
    """Channels of a head; the hidden size divided by the heads where config.json does not say."""
    if text.has("head_dim"):
        return text.int("head_dim")
    return text.int("hidden_size") // text.int("num_attention_heads")


def _int(*names: str) -> Callable[[Hparams], int]:
    return lambda text: text.int(*names)


def _float(*names: str) -> Callable[[Hparams], float]:
    return lambda text: text.float(*names)


def _top_k(text: Hparams) -> int:
    """Experts that a token is sent to.

    Raises:
        InputError: none, or more than there are.
    """
    name = "top_k_experts" if text.has("top_k_experts") else "num_experts_per_tok"
    experts, top_k = expert_sizes(text)[0], text.int(name)
    if not 1 <= top_k <= experts:
        text.refuse(name, f"1 to {experts}, the number of experts", "correct it, as where experts were pruned")
    return top_k


_TEXT: Final[Mapping[str, Callable[[Hparams], MetadataValue]]] = {
    Keys.LLM.VOCAB_SIZE: _int("vocab_size"),
    Keys.LLM.BLOCK_COUNT: _int("num_hidden_layers"),
    Keys.LLM.CONTEXT_LENGTH: _int("max_position_embeddings"),
    Keys.LLM.EMBEDDING_LENGTH: _int("hidden_size"),
    Keys.LLM.FEED_FORWARD_LENGTH: _int("intermediate_size"),
    Keys.LLM.LEADING_DENSE_BLOCK_COUNT: _int("first_k_dense_replace"),
    Keys.Attention.HEAD_COUNT: _int("num_attention_heads"),
    Keys.Attention.HEAD_COUNT_KV: _int("num_key_value_heads"),
    Keys.Attention.KEY_LENGTH: head_dim,
    Keys.Attention.VALUE_LENGTH: head_dim,
    Keys.Attention.LAYERNORM_RMS_EPS: _float("rms_norm_eps"),
    Keys.LLM.EXPERT_COUNT: lambda text: expert_sizes(text)[0],
    Keys.LLM.EXPERT_USED_COUNT: _top_k,
    Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: lambda text: expert_sizes(text)[2],
    Keys.LLM.EXPERT_SHARED_COUNT: _int("n_shared_experts"),
    Keys.LLM.EXPERT_GROUP_COUNT: _int("n_group"),
    Keys.LLM.EXPERT_GROUP_USED_COUNT: _int("topk_group"),
    Keys.LLM.EXPERT_WEIGHTS_SCALE: _float("routed_scaling_factor"),
    Keys.LLM.FULL_ATTENTION_INTERVAL: _int("full_attention_interval"),
}


def common_text_keys(text: Hparams, *keys: str) -> dict[str, MetadataValue]:
    """Values of GGUF keys that text models have under the same names in config.json, in the order of `keys`."""
    return {key: _TEXT[key](text) for key in keys}


def text_ranges(text: Hparams, subsets: Mapping[str, Iterable[int]] = MappingProxyType({})) -> Ranges:
    """Decoder layers and experts.

    Args:
        subsets: layers that rules are confined to, by the subset's name.
    """
    return {
        "layer": numbered("layer", text.int("num_hidden_layers")),
        "expert": numbered("expert", expert_sizes(text)[0]),
        **{name: numbered("layer", layers) for name, layers in subsets.items()},
    }


def vision_ranges(vision: Hparams, subsets: Mapping[str, bool] = MappingProxyType({})) -> Ranges:
    """Blocks of a vision tower.

    Args:
        subsets: by the name of a subset, whether all blocks are in it or none.
    """
    blocks = numbered("block", vision.int("num_hidden_layers", "depth"))
    return {"block": blocks, **{name: blocks if there else [] for name, there in subsets.items()}}


def common_vision_keys(vision: Hparams, *, epsilon: float, image_size: int | None = None) -> dict[str, MetadataValue]:
    """clip.* keys of every vision tower: sizes, heads, the norms' epsilon, and the images' mean and deviation.

    Args:
        image_size: pixels a side, where it is not `image_size` of the vision tower.
    """
    images, keys = image_hparams(vision.checkpoint), Keys.ClipVision
    return {
        keys.PROJECTION_DIM: text_hparams(vision.checkpoint).int("hidden_size"),
        keys.IMAGE_SIZE: vision.int("image_size") if image_size is None else image_size,
        keys.PATCH_SIZE: vision.int("patch_size"),
        keys.EMBEDDING_LENGTH: vision.int("hidden_size"),
        keys.FEED_FORWARD_LENGTH: vision.int("intermediate_size"),
        keys.BLOCK_COUNT: vision.int("num_hidden_layers", "depth"),
        keys.Attention.HEAD_COUNT: vision.int("num_attention_heads", "num_heads"),
        keys.Attention.LAYERNORM_EPS: epsilon,
        keys.IMAGE_MEAN: images.floats("image_mean", 3),
        keys.IMAGE_STD: images.floats("image_std", 3),
    }
