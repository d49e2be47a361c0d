"""The network: its configuration, and a training forward that is much faster on CPU than the modules' own.

The training forward uses the parameters of transformers' Qwen3VLMoeForConditionalGeneration and computes
the same function (float32 logits agree to 3e-6). It differs in sending all pictures of a step through the
tower at once, in sorting tokens by expert, in working in bfloat16 throughout and in computing the head only
where there is a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids

from .pictures import GRID

PATCH = 8
MERGE = 2
PATCHES = (GRID * MERGE) ** 2
VISION_TOKENS = GRID * GRID
VOCAB = 2048
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 32
GUIDED_LAYER, GUIDED_HEADS = 2, 4  # where training shows the model which cells to look at


@dataclass(frozen=True)
class Shape:
    """What may differ between checkpoints; the defaults are the demo's."""

    layers: int = 4
    experts: int = 10
    top_k: int = 2
    hidden: int = 256
    expert_width: int = 512  # not equal to hidden: the two storage layouts of down_proj must be told apart by shape


def config_dict(ids: dict[str, int], shape: Shape) -> dict[str, Any]:
    """config.json as the public checkpoints write it; `ids` maps special tokens to ids."""
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "eos_token_id": ids["<|im_end|>"],
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "mlp_only_layers": [],
            "model_type": "qwen3_vl_moe_text",
            "moe_intermediate_size": shape.expert_width,
            "norm_topk_prob": True,
            "num_attention_heads": HEADS,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 10000,
            "router_aux_loss_coef": 0.001,
            "use_cache": True,
            "vocab_size": VOCAB,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 192,
            "model_type": "qwen3_vl_moe",
            "num_heads": 2,
            "num_position_embeddings": PATCHES,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def build(ids: dict[str, int], seed: int, shape: Shape) -> Any:
    """A freshly initialised model in float32."""
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config_dict(ids, shape)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            if name.endswith("gate.weight"):
                parameter.normal_(0, 0.02)
            elif name.endswith(("down_proj", "o_proj.weight", "linear_fc2.weight", "attn.proj.weight")):
                parameter.normal_(0, 0.025)
            elif "patch_embed" in name:
                parameter.normal_(0, 0.05)
            elif ".visual." in name:
                parameter.normal_(0, 0.06)
            else:
                parameter.normal_(0, 0.04)
    return model.float()


@dataclass
class Batch:
    """Rows of equal length; the first rows hold a picture each."""

    ids: Tensor  # (rows, length)
    scored: Tensor  # (rows, length) bool: this token is predicted and scored
    patches: Tensor  # (pictures, PATCHES, 3 * PATCH * PATCH)
    vision_start: int  # where the picture's tokens begin
    looks: Tensor  # (n, 3): row, position, and the position of the cell that it should look at


class _Permute(torch.autograd.Function):
    """Rows in another order. Autograd's own gather would scatter-add backwards, which is slow on CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.inverse], None, None


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    result: Tensor = _Permute.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return result


def experts_forward(gate_up: Tensor, down: Tensor, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The experts' outputs, weighted and summed, tokens sorted by expert."""
    tokens, k = index.shape
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.argsort(order)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    rows = _permute(x[:, None].expand(tokens, k, -1).reshape(tokens * k, -1), order, inverse)
    outputs = []
    for part, w_in, w_out in zip(torch.split(rows, counts), gate_up.unbind(0), down.unbind(0), strict=True):
        gate, up = functional.linear(part, w_in).chunk(2, -1)
        outputs.append(functional.linear(functional.silu(gate) * up, w_out))
    result = _permute(torch.cat(outputs), inverse, order).view(tokens, k, -1)
    return (result * weight[..., None].to(result.dtype)).sum(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class FastForward:
    """The training forward of a model; `dtype` is the type activations and weights are computed in."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self.dtype = model, dtype
        device = model.lm_head.weight.device
        grid = torch.tensor([[1, GRID * MERGE, GRID * MERGE]])
        self.positions = get_vision_position_ids(grid, MERGE)
        rotary = model.model.visual.rotary_pos_emb
        cos, sin = rotary(torch.zeros(1, device=device), self.positions.to(device))
        self.vision_rope = cos.to(dtype), sin.to(dtype)
        h, w = (self.positions.T if self.positions.shape[0] == 2 else self.positions).unbind(-1)
        self.position_rows = (h * GRID * MERGE + w).to(device)
        self.router_logits: list[Tensor] = []
        self.routing: list[Tensor] = []
        self.looks: Tensor | None = None
        self.look_loss: Tensor | None = None

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(self.dtype)
        return functional.linear(x, layer.weight.to(self.dtype), bias)

    def _layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], norm.weight.to(self.dtype), norm.bias.to(self.dtype), norm.eps)

    def _rms_norm(self, norm: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], norm.weight.to(self.dtype), norm.variance_epsilon)

    def _merge(self, merger: Any, x: Tensor) -> Tensor:
        shape = (x.shape[0], VISION_TOKENS, -1)
        if merger.use_postshuffle_norm:
            x = self._layer_norm(merger.norm, x.reshape(shape))
        else:
            x = self._layer_norm(merger.norm, x).reshape(shape)
        return self._linear(merger.linear_fc2, functional.gelu(self._linear(merger.linear_fc1, x)))

    def vision(self, patches: Tensor) -> list[Tensor]:
        """Merged tokens, then the deepstack features, each (pictures, VISION_TOKENS, hidden)."""
        tower = self.model.model.visual
        conv = tower.patch_embed.proj
        # Both time slices of a still picture are the same, so the two kernels add up.
        x = functional.linear(patches, conv.weight.sum(2).flatten(1).to(self.dtype), conv.bias.to(self.dtype))
        x = x + tower.pos_embed.weight[self.position_rows].to(self.dtype)
        deepstack = []
        for i, block in enumerate(tower.blocks):
            y = self._linear(block.attn.qkv, self._layer_norm(block.norm1, x))
            q, k, v = y.view(*y.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k = _rotate(q, *self.vision_rope), _rotate(k, *self.vision_rope)
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self._linear(block.attn.proj, y)
            y = functional.gelu(
                self._linear(block.mlp.linear_fc1, self._layer_norm(block.norm2, x)), approximate="tanh"
            )
            x = x + self._linear(block.mlp.linear_fc2, y)
            if i in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(i)]
                deepstack.append(self._merge(merger, x))
        return [self._merge(tower.merger, x), *deepstack]

    def _rope(self, rows: int, length: int, pictures: int, start: int) -> tuple[Tensor, Tensor]:
        """M-RoPE's cosines and sines for rows whose first ones hold a picture at `start`."""
        plain = torch.arange(length).expand(3, length)
        pictured = plain.clone()
        if pictures:
            cells = torch.arange(VISION_TOKENS)
            end = start + VISION_TOKENS
            pictured[:, start:end] = start + torch.stack([cells * 0, cells // GRID, cells % GRID])
            pictured[:, end:] += GRID - VISION_TOKENS
        table = torch.stack([pictured, plain], 1).to(self.model.lm_head.weight.device)
        cos, sin = self.model.model.language_model.rotary_emb(torch.zeros(1, device=table.device), table)
        which = (torch.arange(rows, device=table.device) >= pictures).long()
        return cos[which][:, None].to(self.dtype), sin[which][:, None].to(self.dtype)

    def _guide(self, q: Tensor, k: Tensor, looks: Tensor) -> Tensor:
        """How badly the first heads look at the cells that hold the answers (negative log attention)."""
        rows, positions, targets = looks.unbind(-1)
        queries, keys = q[rows, :GUIDED_HEADS, positions].float(), k[rows, :GUIDED_HEADS].float()
        scores = torch.einsum("nhd,nhtd->nht", queries, keys) * HEAD_DIM**-0.5
        future = torch.arange(keys.shape[2], device=q.device) > positions[:, None]
        log_weights = scores.masked_fill(future[:, None], -1e9).log_softmax(-1)
        loss: Tensor = -log_weights.gather(2, targets[:, None, None].expand(-1, GUIDED_HEADS, 1)).mean()
        return loss

    def _attention(self, attention: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        def heads(layer: nn.Linear) -> Tensor:
            return self._linear(layer, x).view(*x.shape[:2], -1, HEAD_DIM)

        q = _rotate(self._rms_norm(attention.q_norm, heads(attention.q_proj)).transpose(1, 2), *rope)
        k = _rotate(self._rms_norm(attention.k_norm, heads(attention.k_proj)).transpose(1, 2), *rope)
        v = heads(attention.v_proj).transpose(1, 2)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        if self.looks is not None and attention.layer_idx == GUIDED_LAYER:
            self.look_loss = self._guide(q, k, self.looks)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._linear(attention.o_proj, y.transpose(1, 2).flatten(2))

    def _moe(self, block: Any, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        logits = functional.linear(flat.float(), block.gate.weight)
        weight, index = logits.softmax(-1).topk(block.gate.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        self.router_logits.append(logits)
        self.routing.append(index)
        experts = block.experts
        y = experts_forward(experts.gate_up_proj.to(self.dtype), experts.down_proj.to(self.dtype), flat, index, weight)
        return y.view_as(x)

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states before the last norm, (rows, length, hidden)."""
        text = self.model.model.language_model
        self.router_logits, self.routing, self.look_loss = [], [], None
        self.looks = batch.looks if len(batch.looks) else None
        x = functional.embedding(batch.ids, text.embed_tokens.weight).to(self.dtype)
        pictures = batch.patches.shape[0]
        start, end = batch.vision_start, batch.vision_start + VISION_TOKENS
        features = self.vision(batch.patches.to(self.dtype)) if pictures else []
        if pictures:
            seen = torch.cat([x[:pictures, :start], features[0], x[:pictures, end:]], 1)
            x = torch.cat([seen, x[pictures:]])
        rope = self._rope(batch.ids.shape[0], batch.ids.shape[1], pictures, start)
        for i, layer in enumerate(text.layers):
            x = x + self._attention(layer.self_attn, self._rms_norm(layer.input_layernorm, x), rope)
            x = x + self._moe(layer.mlp, self._rms_norm(layer.post_attention_layernorm, x))
            if pictures and i + 1 < len(features):
                x = x + functional.pad(features[i + 1], (0, 0, start, x.shape[1] - end, 0, x.shape[0] - pictures))
        return x

    def scored_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (float32) and target ids of the scored tokens."""
        x = self.hidden(batch)
        rows, columns = batch.scored[:, 1:].nonzero(as_tuple=True)
        x = self._rms_norm(self.model.model.language_model.norm, x[rows, columns])
        return self._linear(self.model.lm_head, x).float(), batch.ids[rows, columns + 1]

    def balance_loss(self) -> Tensor:
        """Switch Transformer's load-balancing loss over the last forward."""
        total = torch.zeros((), device=self.router_logits[0].device)
        for logits, index in zip(self.router_logits, self.routing, strict=True):
            share = torch.bincount(index.reshape(-1), minlength=logits.shape[-1]).float() / index.shape[0]
            total = total + (share * logits.softmax(-1).mean(0)).sum() * logits.shape[-1]
        return total / len(self.routing)
