"""Random weights of the modules that several families have, in a fixed order of draws."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Named: TypeAlias = Iterator[tuple[str, torch.Tensor]]
"""Checkpoint names and values."""


class Draw:
    """Random weights of a kind."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def matrix(self, *shape: int, gain: float = 1.0) -> torch.Tensor:
        """Rows of norm near `gain`; the last dimension is the input."""
        return self.normal(*shape) * (gain / math.sqrt(shape[-1]))

    def gains(self, n: int) -> torch.Tensor:
        """Channels of clearly different size, so that an importance matrix has something to say."""
        return torch.exp(0.4 * self.normal(n))

    def bias(self, n: int) -> torch.Tensor:
        return 0.05 * self.normal(n)

    def linear(self, name: str, rows: int, n_in: int) -> Named:
        """A matrix and its bias."""
        yield f"{name}.weight", self.matrix(rows, n_in)
        yield f"{name}.bias", self.bias(rows)

    def layer_norm(self, name: str, n: int) -> Named:
        yield f"{name}.weight", self.gains(n)
        yield f"{name}.bias", self.bias(n)

    def feed_forward(self, prefix: str, width: int, hidden: int) -> Named:
        """The three matrices of a gated feed-forward network, of an expert or of a dense layer."""
        yield f"{prefix}.gate_proj.weight", self.matrix(width, hidden)
        yield f"{prefix}.up_proj.weight", self.matrix(width, hidden)
        yield f"{prefix}.down_proj.weight", self.matrix(hidden, width)

    def patches(self, name: str, hidden: int, *shape: int) -> Named:
        """The convolution over the pixels of a patch, `shape` = (channels, [frames,] rows, columns)."""
        yield name, self.matrix(hidden, math.prod(shape)).view(hidden, *shape)

    def latent_attention(self, prefix: str, hidden: int, sizes: "LatentAttention", *, low_rank: bool = True) -> Named:
        """DeepSeek's attention, whose queries may have a low-rank matrix."""
        query = sizes.heads * (sizes.nope + sizes.rotated)
        if low_rank:
            yield f"{prefix}.q_a_proj.weight", self.matrix(sizes.query_rank, hidden)
            yield f"{prefix}.q_a_layernorm.weight", self.gains(sizes.query_rank)
            yield f"{prefix}.q_b_proj.weight", self.matrix(query, sizes.query_rank)
        else:
            yield f"{prefix}.q_proj.weight", self.matrix(query, hidden)
        yield f"{prefix}.kv_a_proj_with_mqa.weight", self.matrix(sizes.latent + sizes.rotated, hidden)
        yield f"{prefix}.kv_a_layernorm.weight", self.gains(sizes.latent)
        yield f"{prefix}.kv_b_proj.weight", self.matrix(sizes.heads * (sizes.nope + sizes.value), sizes.latent)
        yield f"{prefix}.o_proj.weight", self.matrix(hidden, sizes.heads * sizes.value)


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of latent attention: channels per head, and ranks."""

    heads: int
    nope: int
    rotated: int
    value: int
    query_rank: int
    latent: int

    @classmethod
    def of(cls, text: Mapping[str, Any]) -> "LatentAttention":
        """Those of a `text_config`."""
        return cls(
            heads=text["num_attention_heads"],
            nope=text["qk_nope_head_dim"],
            rotated=text["qk_rope_head_dim"],
            value=text["v_head_dim"],
            query_rank=text["q_lora_rank"],
            latent=text["kv_lora_rank"],
        )


def one_by_one(prefix: str, projection: str, experts: torch.Tensor) -> Named:
    """Experts (E, rows, n_in) as a matrix each; `gate_up` as the two that it is made of."""
    parts = {"gate": 0, "up": 1} if projection == "gate_up" else {projection: 0}
    for expert, matrix in enumerate(experts):
        for part, place in parts.items():
            yield f"{prefix}.{expert}.{part}_proj.weight", matrix.chunk(len(parts))[place]
