"""The smallest honest Gemma 4 MoE checkpoint: every second layer of full attention, which has larger heads."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from tests.families.pico.files import (
    begin_folder,
    in_bfloat16,
    published_config,
    write_json,
    write_readme,
    write_weights,
)
from tests.families.pico.tokenizer import TRAINING_TEXT, VOCAB
from tests.families.pico.weights import Draw, Named

CONFIG = published_config("gemma4_moe")
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
LAYERS, HIDDEN, HEADS = TEXT["num_hidden_layers"], TEXT["hidden_size"], TEXT["num_attention_heads"]
SLIDING_DIM, SLIDING_KV, WINDOW = TEXT["head_dim"], TEXT["num_key_value_heads"], TEXT["sliding_window"]
FULL_DIM, FULL_KV = TEXT["global_head_dim"], TEXT["num_global_key_value_heads"]
EXPERTS, TOP_K = TEXT["num_experts"], TEXT["top_k_experts"]
WIDTH, DENSE_WIDTH = TEXT["moe_intermediate_size"], TEXT["intermediate_size"]
"""Multiples of 32 but not of 256, like 704 and 2112 of the published model."""
SOFT_CAP = TEXT["final_logit_softcapping"]
VISION_HIDDEN, VISION_WIDTH = VISION["hidden_size"], VISION["intermediate_size"]
VISION_BLOCKS, VISION_HEADS = VISION["num_hidden_layers"], VISION["num_attention_heads"]
PATCH, POSITIONS = VISION["patch_size"], VISION["position_embedding_size"]
SOFT_TOKENS = 70
PICTURE = (480, 336)
"""Width and height of a picture of exactly that many tokens, which nobody scales."""

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>"),
    *("<|audio|>", "<|video|>", "<|channel>", "<channel|>", "<|think|>"),
)
token_id = SPECIAL_TOKENS.index
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def write_pico_gemma4_moe(
    folder: Path, *, clipped: bool = False, standardized: bool = True, audio: bool = False
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        clipped: inputs and outputs of the vision tower's linear layers are clipped.
        standardized: soft tokens are standardized.
        audio: with a tensor of an audio tower.
    """
    vision = {**VISION, "use_clipped_linears": clipped, "standardize": standardized}
    begin_folder(folder, "gemma4_moe", {**CONFIG, "vision_config": vision})
    write_tokenizer(folder)
    write_readme(folder, "apache-2.0")
    draw = Draw()
    weights = dict(_text_weights(draw)) | dict(_vision_weights(draw, clipped, standardized))
    if audio:
        weights["model.audio_tower.output_proj.weight"] = draw.matrix(8, 8)
    write_weights(folder, in_bfloat16(weights))
    return folder


def write_tokenizer(folder: Path) -> None:
    """A BPE over whole texts with byte fallback: special tokens, bytes, characters, merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    first = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(first), show_progress=False, max_token_length=8)
    # Words apart, as merges across them would use up the little text at once.
    tokenizer.train_from_iterator([f" {word}" for word in TRAINING_TEXT.split()] + ["\n", "0123456789"], trainer)
    trained = json.loads(tokenizer.to_str())
    pieces = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    vocab = {token: number for number, token in enumerate([*first, *pieces])}
    vocab |= {f"<unused{number}>": number for number in range(len(vocab), VOCAB)}
    assert len(vocab) == VOCAB
    trained["model"] |= {"vocab": vocab, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    trained["added_tokens"] = [
        {"id": number, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number, token in enumerate(SPECIAL_TOKENS)
    ]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rebuilt = Tokenizer.from_str(json.dumps(trained))
    rebuilt.decoder = decoders.Sequence(steps)
    rebuilt.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", token_id("<bos>"))]
    )
    rebuilt.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            **{f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk", "mask")},
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "extra_special_tokens": list(SPECIAL_TOKENS[5:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _text_weights(draw: Draw) -> Named:
    matrix, gains = draw.matrix, draw.gains
    yield "model.language_model.embed_tokens.weight", matrix(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix, full = f"model.language_model.layers.{layer}", layer % 2 == 1
        head_dim, kv_heads = (FULL_DIM, FULL_KV) if full else (SLIDING_DIM, SLIDING_KV)
        yield f"{prefix}.input_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.self_attn.q_proj.weight", matrix(HEADS * head_dim, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(kv_heads * head_dim, HIDDEN)
        if not full:
            yield f"{prefix}.self_attn.v_proj.weight", matrix(kv_heads * head_dim, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(HIDDEN, HEADS * head_dim)
        # Nothing divides by the root of the head size, so that these are small.
        yield f"{prefix}.self_attn.q_norm.weight", gains(head_dim) * head_dim**-0.25
        yield f"{prefix}.self_attn.k_norm.weight", gains(head_dim) * head_dim**-0.25
        yield f"{prefix}.post_attention_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.pre_feedforward_layernorm.weight", gains(HIDDEN)
        yield from draw.feed_forward(f"{prefix}.mlp", DENSE_WIDTH, HIDDEN)
        yield f"{prefix}.post_feedforward_layernorm_1.weight", gains(HIDDEN)
        yield f"{prefix}.router.proj.weight", matrix(EXPERTS, HIDDEN, gain=2.0)
        yield f"{prefix}.router.scale", gains(HIDDEN) * HIDDEN**0.5
        yield f"{prefix}.router.per_expert_scale", gains(EXPERTS)
        yield f"{prefix}.pre_feedforward_layernorm_2.weight", gains(HIDDEN)
        yield f"{prefix}.experts.gate_up_proj", matrix(EXPERTS, 2 * WIDTH, HIDDEN)
        yield f"{prefix}.experts.down_proj", matrix(EXPERTS, HIDDEN, WIDTH)
        yield f"{prefix}.post_feedforward_layernorm_2.weight", gains(HIDDEN)
        yield f"{prefix}.post_feedforward_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.layer_scalar", 0.5 + torch.rand(1, generator=draw.generator)
    yield "model.language_model.norm.weight", 1.5 * gains(HIDDEN)


def _vision_weights(draw: Draw, clipped: bool, standardized: bool) -> Named:
    matrix, gains = draw.matrix, draw.gains
    tower = "model.vision_tower"

    def clippable(name: str, rows: int, n_in: int) -> Named:
        yield f"{name}.linear.weight", matrix(rows, n_in)
        if clipped:
            for bound, value in (("input_min", -1.5), ("input_max", 1.25), ("output_min", -1.0), ("output_max", 0.75)):
                yield f"{name}.{bound}", torch.tensor(value)

    yield f"{tower}.patch_embedder.input_proj.weight", matrix(VISION_HIDDEN, 3 * PATCH * PATCH)
    yield f"{tower}.patch_embedder.position_embedding_table", 0.1 * draw.normal(2, POSITIONS, VISION_HIDDEN)
    for block in range(VISION_BLOCKS):
        prefix = f"{tower}.encoder.layers.{block}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{prefix}.{norm}_layernorm.weight", gains(VISION_HIDDEN)
        for projection in ("q", "k", "v", "o"):
            yield from clippable(f"{prefix}.self_attn.{projection}_proj", VISION_HIDDEN, VISION_HIDDEN)
        for norm in ("q", "k"):
            yield f"{prefix}.self_attn.{norm}_norm.weight", gains(VISION_HIDDEN // VISION_HEADS) * 0.4
        yield from clippable(f"{prefix}.mlp.gate_proj", VISION_WIDTH, VISION_HIDDEN)
        yield from clippable(f"{prefix}.mlp.up_proj", VISION_WIDTH, VISION_HIDDEN)
        yield from clippable(f"{prefix}.mlp.down_proj", VISION_HIDDEN, VISION_WIDTH)
    if standardized:
        yield f"{tower}.std_bias", draw.normal(VISION_HIDDEN)
        yield f"{tower}.std_scale", gains(VISION_HIDDEN)
    yield "model.embed_vision.embedding_projection.weight", matrix(HIDDEN, VISION_HIDDEN)
