"""Sizes of a model family that memory depends on, and the graphs that compute with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mode_gguf.gpu_memory.graph_allocator import Graph


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a text model; `deepstack` counts the image encoder's extra outputs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_used: int
    expert_width: int
    vocabulary: int
    deepstack: int


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Sizes of an image encoder and the mergers behind it."""

    hidden: int
    width: int
    blocks: int
    heads: int
    patch: int
    merge: int
    output: int
    positions: int
    taps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch that a text graph is reserved for.

    Attributes:
        tokens: that are computed at once (`n_ubatch`).
        cells: of the KV cache, of all streams together.
        streams: parallel sequences, unless they share one cache.
        outputs: tokens whose logits are wanted.
        rotated: whether K and V are rotated before they are stored, as llama.cpp does with a quantized cache.
        copied: whether the GPU's flash attention unpacks K and V of a layer, beside its result.
        groups: of experts with a type of their own.
    """

    tokens: int
    cells: int
    streams: int
    outputs: int
    rotated: bool
    copied: bool
    groups: int = 1


@dataclass(frozen=True, slots=True)
class ModelGraphs:
    """The compute graphs that llama.cpp makes of a family's models.

    Attributes:
        text_shape: sizes of the text model, from its GGUF metadata and the rows of its vocabulary.
        encoder_shape: sizes of the image encoder, from the projector's metadata.
        text: all layers over one batch.
        encoder: the image encoder over one image of so many columns and rows of patches.
        image_tokens: llama.cpp's default limit of an image's tokens.
    """

    text_shape: Callable[[Mapping[str, Any], int], TextShape]
    encoder_shape: Callable[[Mapping[str, Any]], EncoderShape]
    text: Callable[[TextShape, Batch], Graph]
    encoder: Callable[[EncoderShape, int, int], Graph]
    image_tokens: int
