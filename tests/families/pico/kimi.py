"""The smallest honest Kimi-VL and Kimi K2.5 checkpoints: one dense layer, two of experts, latent attention."""

import base64
from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico.files import begin_folder, in_bfloat16, published_config, write_json, write_weights
from tests.families.pico.tokenizer import FLAGS, TRAINING_TEXT
from tests.families.pico.weights import Draw, LatentAttention, Named

CONFIGS = {model: published_config(model) for model in ("kimi_vl", "kimi_k25")}
TEXT, VISION = CONFIGS["kimi_k25"]["text_config"], CONFIGS["kimi_vl"]["vision_config"]
LAYERS, DENSE_LAYERS, HIDDEN = TEXT["num_hidden_layers"], TEXT["first_k_dense_replace"], TEXT["hidden_size"]
ATTENTION = LatentAttention.of(TEXT)
EXPERTS, TOP_K, SHARED = TEXT["n_routed_experts"], TEXT["num_experts_per_tok"], TEXT["n_shared_experts"]
WIDTH, DENSE_WIDTH = TEXT["moe_intermediate_size"], TEXT["intermediate_size"]
"""The width of an expert is no multiple of 256, as Kimi-VL's 1408 is not."""
VISION_HIDDEN, VISION_WIDTH = VISION["hidden_size"], VISION["intermediate_size"]
VISION_BLOCKS, VISION_HEADS = VISION["num_hidden_layers"], VISION["num_attention_heads"]
PATCH, POSITIONS = VISION["patch_size"], VISION["init_pos_emb_height"]
"""Pictures of 112 x 112 have as many patches as the table has positions."""
RANKS = 320
VOCAB = RANKS + 256
NAMED = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|im_middle|>": 17,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
}
"""Special tokens, by their places behind the ranks; further ones have no names."""

Layout = Literal["kimi_vl", "kimi_k25", "kimi_k25_packed", "kimi_vl_as_k25"]


def write_pico_kimi(folder: Path, layout: Layout) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        layout: whose names and configuration; weights are the same, but "kimi_k25_packed" has its experts in four bits,
            and Kimi-VL, by Kimi K2.5's names in "kimi_vl_as_k25", one matrix for queries and no scaled positions.
    """
    is_vl = layout == "kimi_vl"
    model = "kimi_vl" if is_vl else "kimi_k25"
    low_rank = "kimi_vl" not in layout
    begin_folder(folder, model, _config(model, low_rank=low_rank, in_four_bits=layout == "kimi_k25_packed"))
    _write_tokenizer(folder, "<|media_start|>" if is_vl else "<|media_begin|>")
    (folder / "README.md").write_text("---\nlicense: mit\npipeline_tag: image-text-to-text\n---\n# Pico\nRandom.\n")
    weights = dict(_weights(Draw(), is_vl=is_vl, low_rank=low_rank))
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in in_bfloat16(weights, "e_score_correction_bias").items():
        in_four_bits = layout == "kimi_k25_packed" and ".experts." in name
        stored |= packed(name, weights[name]) if in_four_bits else {name: tensor}
    write_weights(folder, stored)
    return folder


def special(token: str) -> int:
    return RANKS + NAMED[token]


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What compressed-tensors stores of a matrix: four bits, symmetric, in groups of 32."""
    rows, n_in = weight.shape
    groups = weight.reshape(rows, -1, 32)
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    numbers = (groups / scale.float()[..., None]).round().clamp(-8, 7).reshape(rows, n_in).long() + 8
    words = (numbers.reshape(rows, -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    return {
        f"{name}_packed": (words - (words >= 2**31) * 2**32).int(),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor([rows, n_in]),
    }


def _config(model: str, *, low_rank: bool, in_four_bits: bool) -> dict[str, Any]:
    text = {
        **CONFIGS[model]["text_config"],
        "q_lora_rank": ATTENTION.query_rank if low_rank else None,
        "rope_scaling": TEXT["rope_scaling"] if low_rank else None,
    }
    if in_four_bits:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        text["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
        }
    return {**CONFIGS[model], "text_config": text}


def _weights(draw: Draw, *, is_vl: bool, low_rank: bool) -> Named:
    matrix, gains = draw.matrix, draw.gains
    text = "language_model.model"
    yield f"{text}.embed_tokens.weight", draw.normal(VOCAB, HIDDEN) * 0.5
    for layer in range(LAYERS):
        prefix = f"{text}.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", gains(HIDDEN)
        yield from draw.latent_attention(f"{prefix}.self_attn", HIDDEN, ATTENTION, low_rank=low_rank)
        yield f"{prefix}.post_attention_layernorm.weight", gains(HIDDEN)
        if layer < DENSE_LAYERS:
            yield from draw.feed_forward(f"{prefix}.mlp", DENSE_WIDTH, HIDDEN)
            continue
        yield f"{prefix}.mlp.gate.weight", matrix(EXPERTS, HIDDEN, gain=2.0)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", draw.normal(EXPERTS) * 0.3
        for expert in range(EXPERTS):
            yield from draw.feed_forward(f"{prefix}.mlp.experts.{expert}", WIDTH, HIDDEN)
        yield from draw.feed_forward(f"{prefix}.mlp.shared_experts", SHARED * WIDTH, HIDDEN)
    yield f"{text}.norm.weight", gains(HIDDEN)
    yield "language_model.lm_head.weight", matrix(VOCAB, HIDDEN, gain=2.0)
    yield from _vision_weights(draw, is_vl=is_vl)


def _vision_weights(draw: Draw, *, is_vl: bool) -> Named:
    tower = "vision_tower"
    yield from draw.patches(f"{tower}.patch_embed.proj.weight", VISION_HIDDEN, 3, PATCH, PATCH)
    yield f"{tower}.patch_embed.proj.bias", draw.bias(VISION_HIDDEN)
    yield f"{tower}.patch_embed.pos_emb.weight", 0.3 * draw.normal(POSITIONS, POSITIONS, VISION_HIDDEN)
    for block in range(VISION_BLOCKS):
        prefix = f"{tower}.encoder.blocks.{block}"
        yield from draw.layer_norm(f"{prefix}.norm0", VISION_HIDDEN)
        yield from draw.layer_norm(f"{prefix}.norm1", VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.wqkv", 3 * VISION_HIDDEN, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.wo", VISION_HIDDEN, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.mlp.fc0", VISION_WIDTH, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.mlp.fc1", VISION_HIDDEN, VISION_WIDTH)
    yield from draw.layer_norm(f"{tower}.encoder.final_layernorm", VISION_HIDDEN)
    projector = "multi_modal_projector" if is_vl else "mm_projector"
    merged = 4 * VISION_HIDDEN
    yield from draw.layer_norm(f"{projector}.pre_norm", VISION_HIDDEN)
    yield from draw.linear(f"{projector}.linear_1" if is_vl else f"{projector}.proj.0", merged, merged)
    yield from draw.linear(f"{projector}.linear_2" if is_vl else f"{projector}.proj.2", HIDDEN, merged)


def _write_tokenizer(folder: Path, begin: str) -> None:
    ranks = _ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("".join(lines))
    names = {**NAMED, begin: 18}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "TikTokenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
            "bos_token": "[BOS]",
            "eos_token": "[EOS]",
            "added_tokens_decoder": {
                str(RANKS + place): {"content": token, **FLAGS} for token, place in sorted(names.items())
            },
        },
    )
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>"
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        + begin
        + "image<|media_content|><|media_pad|><|media_end|>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
    )


def _ranks() -> list[bytes]:
    """Bytes, then the most frequent pairs of neighbours within words, pair by pair."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in f" {word}".encode()] for word in (TRAINING_TEXT + " 你好 世界").split()]
    while len(tokens) < RANKS:
        pairs = [(word[i], word[i + 1]) for word in words for i in range(len(word) - 1)]
        left, right = max(dict.fromkeys(pairs), key=pairs.count)
        tokens.append(left + right)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    return tokens
