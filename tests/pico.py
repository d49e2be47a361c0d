"""The smallest honest Qwen3-VL-MoE checkpoint: random weights, real file formats, for transformers and llama.cpp.

Everything a public checkpoint has is there (config, sharded safetensors with an index, byte-level BPE tokenizer, chat
template, image preprocessor, README front matter), so that tests read what users read.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HIDDEN = 256
VOCAB = 512
VISION_HIDDEN = 64
VISION_WIDTH = 128
VISION_BLOCKS = 3
DEEPSTACK_LAYERS = (0, 2)
PATCH = 16
MERGE = 2
POSITIONS = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the colour of the square in the image? "
    "The square is red. The circle is blue, and the triangle on the left is green. How many shapes are there? "
    "There are 3 shapes: a square, a circle and a triangle. Describe the picture in one sentence, please. "
    "It doesn't show text; it's a drawing we've seen before.\n"
)

Layout = Literal["public", "module"]


def write_pico_qwen3vlmoe(
    folder: Path,
    *,
    seed: int = 0,
    layout: Layout = "public",
    dtype: str = "bfloat16",
    layers: int = 3,
    experts: int = 4,
    experts_used: int = 2,
    expert_width: int = 512,
    shards: int = 2,
    tied: bool = False,
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        seed: of the weights.
        layout: "public" stores the fused experts as (E, H, 2I) and (E, I, H), like the checkpoints on the hubs;
            "module" as (E, 2I, H) and (E, H, I), like a re-save by transformers 5.
        dtype: torch's name of the stored type.
        layers: more than the two DeepStack mergers, which llama.cpp's last layer has no place for.
        expert_width: I; 512 is told apart from H = 256 by shape, 256 and 128 are the ambiguous widths.
        shards: safetensors files; 1 writes a single `model.safetensors` without an index.
        tied: the output head is the token embedding, and is not stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_json(folder / "config.json", _config(layout, dtype, layers, experts, experts_used, expert_width, tied))
    write_surroundings(folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in _weights(generator, layout, layers, experts, expert_width, tied)
    }
    write_weights(folder, weights, shards)
    return folder


def write_surroundings(folder: Path) -> None:
    """Generation settings, image preprocessor, and a README with front matter."""
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")]},
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 8 * 32 * 32, "longest_edge": 256 * 32 * 32},
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n# Pico\nRandom weights.\n"
    )


def vision_config(model_type: str, **settings: Any) -> dict[str, Any]:
    """Of Qwen's vision tower."""
    return {
        "model_type": model_type,
        "depth": VISION_BLOCKS,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_WIDTH,
        "num_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": POSITIONS,
        "out_hidden_size": HIDDEN,
        **settings,
    }


def _config(
    layout: Layout, dtype: str, layers: int, experts: int, experts_used: int, expert_width: int, tied: bool
) -> dict[str, Any]:
    sections = {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
    theta = 5_000_000.0
    old_style = layout == "public"
    rope: dict[str, Any] = (
        {"rope_scaling": sections, "rope_theta": theta}
        if old_style
        else {"rope_parameters": {**sections, "rope_theta": theta}}
    )
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "transformers_version": "4.57.0" if old_style else "5.23.0",
        "tie_word_embeddings": tied,
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "dtype": dtype,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "moe_intermediate_size": expert_width,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_experts" if old_style else "num_local_experts": experts,
            "num_experts_per_tok": experts_used,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "tie_word_embeddings": tied,
            **rope,
        },
        "vision_config": vision_config("qwen3_vl_moe", deepstack_visual_indexes=list(DEEPSTACK_LAYERS)),
    }


class Draw:
    """Random weights of a kind."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def matrix(self, *shape: int, gain: float = 1.0) -> torch.Tensor:
        """Rows of norm near `gain`; the last dimension is the input."""
        return torch.randn(*shape, generator=self.generator) * (gain / math.sqrt(shape[-1]))

    def gains(self, n: int) -> torch.Tensor:
        """Channels of clearly different size, so that an importance matrix has something to say."""
        return torch.exp(0.4 * torch.randn(n, generator=self.generator))


def _weights(
    generator: torch.Generator, layout: Layout, layers: int, experts: int, expert_width: int, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    draw = Draw(generator)
    matrix, gains = draw.matrix, draw.gains

    yield "model.language_model.embed_tokens.weight", torch.randn(VOCAB, HIDDEN, generator=generator) * 0.5
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.self_attn.q_proj.weight", matrix(HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(HIDDEN, HEADS * HEAD_DIM)
        yield f"{prefix}.self_attn.q_norm.weight", gains(HEAD_DIM)
        yield f"{prefix}.self_attn.k_norm.weight", gains(HEAD_DIM)
        yield f"{prefix}.post_attention_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.mlp.gate.weight", matrix(experts, HIDDEN, gain=2.0)
        gate_up = matrix(experts, 2 * expert_width, HIDDEN)
        down = matrix(experts, HIDDEN, expert_width)
        transposed = layout == "public"
        yield f"{prefix}.mlp.experts.gate_up_proj", gate_up.mT if transposed else gate_up
        yield f"{prefix}.mlp.experts.down_proj", down.mT if transposed else down
    yield "model.language_model.norm.weight", gains(HIDDEN)
    if not tied:
        yield "lm_head.weight", matrix(VOCAB, HIDDEN, gain=2.0)
    yield from vision_weights(generator, taps=len(DEEPSTACK_LAYERS))


def vision_weights(generator: torch.Generator, *, taps: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of Qwen's vision tower, with so many DeepStack mergers."""
    draw = Draw(generator)
    matrix, gains = draw.matrix, draw.gains

    def linear(name: str, rows: int, n_in: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", matrix(rows, n_in)
        yield f"{name}.bias", 0.05 * torch.randn(rows, generator=generator)

    def layer_norm(name: str, n: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", gains(n)
        yield f"{name}.bias", 0.05 * torch.randn(n, generator=generator)

    n_patch = 3 * 2 * PATCH * PATCH
    yield (
        "model.visual.patch_embed.proj.weight",
        matrix(VISION_HIDDEN, n_patch).view(VISION_HIDDEN, 3, 2, PATCH, PATCH),
    )
    yield "model.visual.patch_embed.proj.bias", 0.05 * torch.randn(VISION_HIDDEN, generator=generator)
    yield "model.visual.pos_embed.weight", 0.1 * torch.randn(POSITIONS, VISION_HIDDEN, generator=generator)
    for block in range(VISION_BLOCKS):
        prefix = f"model.visual.blocks.{block}"
        yield from layer_norm(f"{prefix}.norm1", VISION_HIDDEN)
        yield from layer_norm(f"{prefix}.norm2", VISION_HIDDEN)
        yield from linear(f"{prefix}.attn.qkv", 3 * VISION_HIDDEN, VISION_HIDDEN)
        yield from linear(f"{prefix}.attn.proj", VISION_HIDDEN, VISION_HIDDEN)
        yield from linear(f"{prefix}.mlp.linear_fc1", VISION_WIDTH, VISION_HIDDEN)
        yield from linear(f"{prefix}.mlp.linear_fc2", VISION_HIDDEN, VISION_WIDTH)
    n_merged = VISION_HIDDEN * MERGE * MERGE
    yield from layer_norm("model.visual.merger.norm", VISION_HIDDEN)
    yield from linear("model.visual.merger.linear_fc1", n_merged, n_merged)
    yield from linear("model.visual.merger.linear_fc2", HIDDEN, n_merged)
    for index in range(taps):
        prefix = f"model.visual.deepstack_merger_list.{index}"
        yield from layer_norm(f"{prefix}.norm", n_merged)
        yield from linear(f"{prefix}.linear_fc1", n_merged, n_merged)
        yield from linear(f"{prefix}.linear_fc2", HIDDEN, n_merged)


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(weights)
    files = {
        name: f"model-{1 + i * shards // len(names):05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def token_id(token: str, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> int:
    """Its id: special tokens follow the trained vocabulary, as in Qwen's files; the rest up to VOCAB is padding."""
    return _trained_size() + special_tokens.index(token)


def _trained_size() -> int:
    return 400


def write_tokenizer(
    folder: Path,
    split: str = QWEN2_SPLIT,
    tokenizer_class: str = "Qwen2Tokenizer",
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    eos: str = "<|im_end|>",
    chat_template: str = CHAT_TEMPLATE,
    normalised: bool = True,
) -> None:
    """A byte-level BPE, with Qwen's special tokens and NFC by default; its configuration and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    if normalised:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_trained_size(),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    added = [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    tokenizer.add_special_tokens(added)
    assert tokenizer.token_to_id(special_tokens[0]) == _trained_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": tokenizer_class,
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": eos,
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "added_tokens_decoder": {
                str(_trained_size() + i): {
                    "content": token,
                    "special": True,
                    "normalized": False,
                    "lstrip": False,
                    "rstrip": False,
                    "single_word": False,
                }
                for i, token in enumerate(special_tokens)
            },
            "chat_template": chat_template,
        },
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
