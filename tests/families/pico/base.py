"""Pico checkpoints of MoE models outside the list of families, as transformers saves them: random weights, hub layout.

One is text-only (OLMoE), one sees (Idefics3's encoder before a Mixtral), a combination that both transformers and
llama.cpp have, though nobody has published one.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Idefics3Config, MixtralConfig, OlmoeConfig
from transformers.utils.logging import disable_progress_bar

from tests.families.pico.files import write_json
from tests.families.pico.qwen3_vl_moe import HIDDEN
from tests.families.pico.tokenizer import (
    CHAT_TEMPLATE,
    IMAGE_OF_TEMPLATE,
    VOCAB,
    add_tokens,
    token_id,
    write_tokenizer,
)

LAYERS, EXPERTS, TOP_K, WIDTH = 3, 4, 2, 512
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
BEFORE_IMAGE = "\n\n"
"""A token that llama.cpp looks up to put before a picture."""
TILE, PATCH, SCALE = 128, 16, 2

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def write_pico_olmoe(folder: Path, seed: int = 0) -> Path:
    """OLMoE with experts one by one, as on the hub; returns `folder`."""
    config = OlmoeConfig(**_TEXT, num_experts=EXPERTS, num_key_value_heads=4, norm_topk_prob=False)
    _save(folder, AutoModelForCausalLM, config, seed)
    write_tokenizer(folder)
    return folder


def write_pico_idefics3_mixtral(folder: Path) -> Path:
    """Idefics3's encoder and a Mixtral, whose Q and K stock conversion writes in another order of rows."""
    text = MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=EXPERTS, head_dim=64)
    config = Idefics3Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "hidden_act": "gelu_pytorch_tanh",
        },
        text_config={**text.to_dict(), "architectures": ["MixtralForCausalLM"]},
        image_token_id=token_id("<|video_pad|>") + 1,
        scale_factor=SCALE,
        pad_token_id=token_id("<|endoftext|>"),
    )
    _save(folder, AutoModelForImageTextToText, config)
    write_tokenizer(folder)
    template = CHAT_TEMPLATE.replace(IMAGE_OF_TEMPLATE, IMAGE_TOKENS[0])
    add_tokens(folder, IMAGE_TOKENS, template, plain=[BEFORE_IMAGE])
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "do_image_splitting": True,
            "size": {"longest_edge": 2 * TILE},
            "max_image_size": {"longest_edge": TILE},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    seen = (TILE // PATCH // SCALE) ** 2
    write_json(folder / "processor_config.json", {"processor_class": "Idefics3Processor", "image_seq_len": seen})
    return folder


def _save(folder: Path, auto: Any, config: Any, seed: int = 0) -> None:
    disable_progress_bar()
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Channels of clearly different size, so that an importance matrix has something to say.
                parameter.copy_(torch.exp(0.4 * torch.randn(parameter.shape)) if "norm" in name else parameter)
            else:
                gain = 2.0 if name.endswith(("gate.weight", "router.weight", "lm_head.weight")) else 1.0
                parameter.copy_(torch.randn(parameter.shape) * gain / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
