"""The smallest honest Mistral Small 4 checkpoint: latent attention, a shared expert, a Pixtral tower."""

import json
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, processors

from tests.families.pico.files import (
    begin_folder,
    in_bfloat16,
    published_config,
    write_json,
    write_readme,
    write_weights,
)
from tests.families.pico.tokenizer import VOCAB, train_byte_level
from tests.families.pico.weights import Draw, LatentAttention, Named

TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
)
"""The first of the thousand that Mistral's vocabularies begin with, at their places."""
token_id = SPECIAL_TOKENS.index
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST]"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}[IMG]{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}[/INST]"
    "{% else %}{{ message.content if message.content is string else message.content[0].text }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
CONFIG = published_config("mistral4")
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
LAYERS, HIDDEN = TEXT["num_hidden_layers"], TEXT["hidden_size"]
ATTENTION = LatentAttention.of(TEXT)
EXPERTS, TOP_K, WIDTH = TEXT["n_routed_experts"], TEXT["num_experts_per_tok"], TEXT["moe_intermediate_size"]
VISION_HIDDEN, VISION_WIDTH = VISION["hidden_size"], VISION["intermediate_size"]
VISION_BLOCKS, VISION_HEADS = VISION["num_hidden_layers"], VISION["num_attention_heads"]
PATCH, MERGE = VISION["patch_size"], CONFIG["spatial_merge_size"]
ROPE = TEXT["rope_parameters"]
ORIGINAL_CONTEXT = ROPE["original_max_position_embeddings"]
"""Positions from here on are seen with another attention temperature, as from 8192 on in the public model."""

Layout = Literal["module", "public"]


def write_pico_mistral4(
    folder: Path, *, layout: Layout = "public", projector_bias: bool = False, fp8: bool = False
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        layout: "module" names tensors as transformers names parameters, "public" as it saves them.
        projector_bias: the projector's two matrices have biases.
        fp8: linear layers and experts of the text model are stored in FP8, with scales of weights and of activations.
    """
    config = {**CONFIG, "multimodal_projector_bias": projector_bias}
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        }
    begin_folder(folder, "mistral4", config)
    write_tekken(folder)
    write_readme(folder, "apache-2.0", more="")
    draw = Draw()
    weights = {
        _public(name) if layout == "public" else name: tensor
        for name, tensor in _weights(draw, projector_bias=projector_bias)
    }
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in in_bfloat16(weights).items():
        in_fp8 = fp8 and "_proj" in name and "language_model" in name
        stored |= _in_fp8(name, weights[name]) if in_fp8 else {name: tensor}
    write_weights(folder, stored)
    return folder


def _in_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix with a scale, or experts with one each, and what activations are scaled with."""
    scale = tensor.abs().amax(dim=(-2, -1), keepdim=tensor.ndim == 3) / 448
    experts = {f"{name}_activation_scale": torch.ones(len(tensor))}
    linear = {f"{name.removesuffix('weight')}activation_scale": torch.ones(())}
    return {
        name: (tensor / scale).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": scale,
        **(experts if tensor.ndim == 3 else linear),
    }


def _public(name: str) -> str:
    """A parameter's name as transformers saves it."""
    if name == "lm_head.weight":
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.")


def _weights(draw: Draw, *, projector_bias: bool) -> Named:
    """By names of parameters."""
    matrix, gains = draw.matrix, draw.gains
    yield "model.language_model.embed_tokens.weight", draw.normal(VOCAB, HIDDEN) * 0.5
    for layer in range(LAYERS):
        prefix = f"model.language_model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", gains(HIDDEN)
        yield from draw.latent_attention(f"{prefix}.self_attn", HIDDEN, ATTENTION)
        yield f"{prefix}.post_attention_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.mlp.gate.weight", matrix(EXPERTS, HIDDEN, gain=2.0)
        yield f"{prefix}.mlp.experts.gate_up_proj", matrix(EXPERTS, 2 * WIDTH, HIDDEN)
        yield f"{prefix}.mlp.experts.down_proj", matrix(EXPERTS, HIDDEN, WIDTH)
        yield from draw.feed_forward(f"{prefix}.mlp.shared_experts", WIDTH, HIDDEN)
    yield "model.language_model.norm.weight", gains(HIDDEN)
    yield "lm_head.weight", matrix(VOCAB, HIDDEN, gain=2.0)
    tower = "model.vision_tower"
    yield from draw.patches(f"{tower}.patch_conv.weight", VISION_HIDDEN, 3, PATCH, PATCH)
    yield f"{tower}.ln_pre.weight", gains(VISION_HIDDEN)
    for block in range(VISION_BLOCKS):
        prefix = f"{tower}.transformer.layers.{block}"
        yield f"{prefix}.attention_norm.weight", gains(VISION_HIDDEN)
        for projection in ("q", "k", "v", "o"):
            yield f"{prefix}.attention.{projection}_proj.weight", matrix(VISION_HIDDEN, VISION_HIDDEN)
        yield f"{prefix}.ffn_norm.weight", gains(VISION_HIDDEN)
        yield from draw.feed_forward(f"{prefix}.feed_forward", VISION_WIDTH, VISION_HIDDEN)
    projector = "model.multi_modal_projector"
    yield f"{projector}.norm.weight", gains(VISION_HIDDEN)
    yield f"{projector}.patch_merger.merging_layer.weight", matrix(VISION_HIDDEN, VISION_HIDDEN * MERGE * MERGE)
    for name, n_in in (("linear_1", VISION_HIDDEN), ("linear_2", HIDDEN)):
        yield f"{projector}.{name}.weight", matrix(HIDDEN, n_in)
        if projector_bias:
            yield f"{projector}.{name}.bias", 0.1 * draw.normal(HIDDEN)


def write_tekken(folder: Path) -> None:
    """A byte-level BPE with Mistral's split and special tokens, its configuration and a chat template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    train_byte_level(tokenizer, TEKKEN_SPLIT, SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", token_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert [model["vocab"][token] for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
