"""Selection of key vision tokens: MODE's criterion, and those it is compared with.

Every decoder layer chooses anew, from what its own attention computes with; nothing is left out of the forward. The
paper follows SparseVLM: a vision token j is scored by the mean over heads and text queries i of A[i, j], with A the
layer's attention after softmax, and the best 20 % are key. Queries are text tokens after the first image token, without
those of the chat template. The rows of A that a criterion asks for are computed in blocks, next to the layer's fast
attention.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.modality import KeyTokens

_BLOCK_ELEMENTS = 1 << 24
"""Maximum number of attention weights or distances computed at once: 64 MiB of float32."""


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Attention inputs of one layer on one sample of S tokens.

    Attributes:
        query: (heads, S, d) after rotary embedding.
        key: (kv heads, S, d) after rotary embedding; heads is a multiple of kv heads.
        value: (kv heads, S, d).
        mask: (1, 1, S, S) bool (True = visible) or additive; None means causal.
        scaling: of query . key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float


def key_vision_tokens(chosen: KeyTokens, inputs: ModelInputs, layer: int, attention: LayerAttention) -> Tensor:
    """Positions of a sample's key vision tokens in one layer, int64, on the layer's device; it has vision tokens."""
    is_vision = inputs.is_vision.to(attention.query.device)
    vision = torch.nonzero(is_vision)[:, 0]
    count = chosen.count(len(vision))
    match chosen.criterion:
        case "all":
            return vision
        case "random":
            generator = torch.Generator().manual_seed(_draw_seed(chosen.seed, layer, inputs))
            return vision[torch.randperm(len(vision), generator=generator)[:count].to(vision.device)]
        case "max-min-diversity":
            return vision[most_diverse(attention.value[:, vision].transpose(0, 1).flatten(1), count)]
        case "received-attention":
            scores = received_attention(attention, is_vision)
        case "text-attention":
            scores = text_attention(attention, inputs.is_query.to(is_vision.device), is_vision)
        case "redundant":
            scores = -text_attention(attention, inputs.is_query.to(is_vision.device), is_vision)
    return vision[torch.argsort(scores, descending=True, stable=True)[:count]]


def text_attention(attention: LayerAttention, is_query: Tensor, is_vision: Tensor) -> Tensor:
    """Mean attention every vision token receives from the text queries (SparseVLM).

    Args:
        is_query: (S,) bool, the text tokens that ask; at least one.
        is_vision: (S,) bool, the tokens that are scored.

    Returns:
        float32 (n_vision,), in token order.
    """
    rows = torch.nonzero(is_query)[:, 0]
    total = torch.zeros(int(is_vision.sum()), device=rows.device)
    for _, weights in _attention_rows(attention, rows):
        total += weights[:, :, is_vision].sum((0, 1))
    return total / (len(attention.query) * len(rows))


def received_attention(attention: LayerAttention, is_vision: Tensor) -> Tensor:
    """Mean attention every vision token receives from all tokens after it, text and vision: float32 (n_vision,).

    The mean is over the tokens that can see it, so that early tokens gain nothing by being seen by more.
    """
    vision = torch.nonzero(is_vision)[:, 0]
    total = torch.zeros(len(vision), device=vision.device)
    for block, weights in _attention_rows(attention, torch.arange(len(is_vision), device=vision.device)):
        later = block[:, None] > vision
        total += (weights[:, :, vision] * later).sum((0, 1))
    n_later = len(is_vision) - 1 - vision
    return total / (len(attention.query) * n_later.clamp(min=1))


def most_diverse(features: Tensor, count: int) -> Tensor:
    """`count` of the tokens with features (n, width), each the farthest by cosine distance from those before it, int64.

    DivPrune's greedy answer to the max-min diversity problem (arXiv 2503.02175): the first is the token whose nearest
    other is farthest. There the features are what the vision encoder puts out; here every layer chooses from its own
    value vectors, the projection of its normalised input that attention hands on. Keys would not do: rotary embedding
    turns them by their position, and equal patches would count as different for lying apart.
    """
    features = normalize(features.float(), dim=-1)
    scores = _distance_to_nearest(features)
    nearest = torch.full_like(scores, torch.inf)
    chosen = []
    for _ in range(count):
        pick = scores.argmax()
        chosen.append(pick)
        nearest = torch.minimum(nearest, 1 - features @ features[pick])
        nearest[pick] = -torch.inf  # stays the least: no token is chosen twice, not even among equal ones
        scores = nearest
    return torch.stack(chosen)


def _distance_to_nearest(features: Tensor) -> Tensor:
    """Cosine distance of every unit vector (n, width) from the nearest other one, (n,)."""
    positions = torch.arange(len(features), device=features.device)
    distances = []
    for rows in torch.split(positions, max(1, _BLOCK_ELEMENTS // len(features))):
        distance = 1 - features[rows] @ features.T
        distance[positions[: len(rows)], rows] = torch.inf
        distances.append(distance.amin(-1))
    return torch.cat(distances)


def _attention_rows(attention: LayerAttention, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention of the tokens at `rows`, in blocks: (b,) of them and float32 (heads, b, S) after softmax."""
    heads, length, _ = attention.query.shape
    keys = attention.key.repeat_interleave(heads // attention.key.shape[0], dim=0).float()
    mask = attention.mask
    for block in torch.split(rows, max(1, _BLOCK_ELEMENTS // (heads * length))):
        logits = torch.matmul(attention.query[:, block].float(), keys.mT) * attention.scaling
        if mask is None:
            hidden = torch.arange(length, device=rows.device) > block[:, None]
            logits = logits.masked_fill(hidden, -torch.inf)
        elif mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask[0, :, block], -torch.inf)
        else:
            logits = logits + mask[0, :, block]
        yield block, logits.softmax(-1)


def _draw_seed(seed: int, layer: int, inputs: ModelInputs) -> int:
    """Seed of the random criterion's draw, by sample content, layer and seed, whatever the samples' order."""
    digest = zlib.crc32(f"{seed} {layer}".encode())
    for content in (inputs.input_ids, inputs.image.get("pixel_values")):
        if content is not None:
            digest = zlib.crc32(content.numpy().tobytes(), digest)
    return digest
