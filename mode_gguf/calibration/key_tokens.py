"""Which vision tokens carry information: those the text looks at (SparseVLM's criterion, as MODE uses it).

At every decoder layer, from that layer's own attention A (after softmax), a vision token j is scored by the mean over
heads and text queries i of A[i, j]; the best 20 % are key. Queries are text tokens after the first image token, without
the tokens of the chat template. Only those rows of A are computed, in blocks, next to the layer's fast attention.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24
"""Most attention weights computed at once: 64 MiB of float32."""


def vision_scores(
    query: Tensor, key: Tensor, is_query: Tensor, is_vision: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Mean attention every vision token receives from the text queries.

    Args:
        query: (heads, S, d) after rotary embedding.
        key: (kv heads, S, d) after rotary embedding; heads is a multiple of kv heads.
        is_query: (S,) bool, the text tokens that ask; at least one.
        is_vision: (S,) bool, the tokens that are scored.
        mask: (1, 1, S, S) bool (True = visible) or additive; None means causal.
        scaling: of query . key.

    Returns:
        float32 (n_vision,), in token order.
    """
    rows = torch.nonzero(is_query)[:, 0]
    heads, length, _ = query.shape
    keys = key.repeat_interleave(heads // key.shape[0], dim=0).float()
    total = torch.zeros(int(is_vision.sum()), device=query.device)
    for block in torch.split(rows, max(1, _BLOCK_ELEMENTS // (heads * length))):
        logits = torch.matmul(query[:, block].float(), keys.mT) * scaling
        if mask is None:
            hidden = torch.arange(length, device=query.device) > block[:, None]
            logits = logits.masked_fill(hidden, -torch.inf)
        elif mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask[0, :, block], -torch.inf)
        else:
            logits = logits + mask[0, :, block]
        total += logits.softmax(-1)[:, :, is_vision].sum((0, 1))
    return total / (heads * len(rows))


def key_vision_tokens(scores: Tensor, is_vision: Tensor, ratio: float) -> Tensor:
    """Positions in the sample of the max(1, int(ratio * n_vision)) best scored vision tokens, int64."""
    count = max(1, int(ratio * len(scores)))
    best = torch.argsort(scores, descending=True, stable=True)[:count]
    return torch.nonzero(is_vision)[:, 0][best]
