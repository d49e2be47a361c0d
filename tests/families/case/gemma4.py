"""Gemma 4 MoE."""

import numpy as np
from torch.nn.functional import gelu

from mode_gguf.architectures import projector_tensors
from mode_gguf.architectures.tensors import Role
from tests.families import prompts
from tests.families.case.shared import DENSE_FFN, FEW
from tests.families.family_case import Change, Conversion, FamilyCase, MeasuredChange, StockDifference, block, weights
from tests.families.pico import gemma4_moe as pico
from tests.families.refusal import TEXT, VISION, Refusal, of_rope, unlike


def patches_of_pixels(matrix: np.ndarray) -> np.ndarray:
    """From the pixels of a patch in a row to (channels, rows, columns)."""
    patches = matrix.reshape(pico.VISION_HIDDEN, pico.PATCH, pico.PATCH, 3)
    return np.ascontiguousarray(patches.transpose(0, 3, 1, 2))


FULL = {"rope_type": "proportional", "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}


def gemma_layer(values: str) -> dict[str, Role]:
    """A decoder layer; those of full attention have no values of their own."""
    return block(
        dense=f"attn_q attn_k {values} attn_output {DENSE_FFN}",
        keep="attn_norm attn_q_norm attn_k_norm post_attention_norm ffn_norm post_ffw_norm_1 pre_ffw_norm_2 "
        "post_ffw_norm_2 post_ffw_norm ffn_gate_inp ffn_gate_inp.scale= ffn_down_exps.scale= layer_output_scale",
        experts="gate_up down",
    )


GEMMA4 = FamilyCase(
    name="gemma4",
    refusals=(
        *unlike(TEXT, hidden_size_per_layer_input=256, num_kv_shared_layers=2, use_bidirectional_attention=None),
        *unlike(TEXT, use_bidirectional_attention="all", hidden_activation="silu", attention_bias=True),
        *unlike(TEXT, layer_types=["full_attention", "linear_attention"]),
        *unlike(TEXT, per_layer_config={"0": {"head_dim": 64}, "1": {"head_dim": 128}}),
        *unlike(VISION, names="vision ", hidden_activation="gelu", attention_bias=True, num_key_value_heads=1),
        *unlike(VISION, names="vision ", head_dim=64),
        *of_rope("rope_parameters", VISION, "vision rope_theta", {"rope_theta": 50.0}),
        *(
            Refusal(TEXT, {"rope_parameters": {"full_attention": {**FULL, **full}, "sliding_attention": sliding}}, says)
            for full, sliding, says in (
                ({"rope_type": "yarn", "factor": 2.0}, SLIDING, "full_attention rope_type is 'yarn', expected 'prop"),
                ({"rope_type": "linear", "factor": 0.5}, SLIDING, "full_attention factor is 0.5, expected 1 or more"),
                ({"rope_type": "linear"}, SLIDING, r"factor \(float\) is missing"),
                ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}, SLIDING, "partial_.* is 0.25"),
                ({"rope_theta": None}, SLIDING, r"rope_theta \(float\) is missing"),
                (LLAMA3, SLIDING, "high_freq_factor is 1.0, expected more than low_freq_factor, 1.0"),
                ({}, {**SLIDING, "rope_type": "linear", "factor": 2.0}, "sliding_attention rope_type is 'linear'"),
                ({}, {}, r"rope_theta \(float\) is missing"),
            )
        ),
        *unlike(TEXT, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        Refusal(TEXT, {"enable_moe_block": False}, "not a Mixture-of-Experts model"),
        Refusal(
            VISION,
            {"patch_size": 14},
            r"input_proj\.weight has shape \[64, 768\], expected \[64, 588\]",
            projector_tensors,
        ),
    ),
    pico=pico,
    write=pico.write_pico_gemma4_moe,
    layouts=("pico_gemma4",),
    gguf_arch="gemma4",
    projector_type="gemma4v",
    outside={"rope_freqs.weight": Role.KEEP, "token_embd.weight": Role.EMBEDDING, "output_norm.weight": Role.KEEP},
    layers=(gemma_layer("attn_v"), gemma_layer("")) * 2,
    vision=weights("v.patch_embd v.position_embd v.std_bias= v.std_scale= mm.input_projection"),
    vision_block=weights(
        "ln1 attn_q_norm attn_k_norm attn_post_norm ln2 ffn_post_norm attn_q attn_k attn_v attn_out ffn_gate ffn_up "
        "ffn_down"
    ),
    converted={r"v\.patch_embd\.weight": patches_of_pixels, r"rope_freqs\.weight": None},
    text_keys={
        "attention.head_count_kv": [2, 1, 2, 1],
        "attention.sliding_window_pattern": [True, False, True, False],
        "attention.key_length": pico.FULL_DIM,
        "attention.key_length_swa": pico.SLIDING_DIM,
        "attention.sliding_window": pico.WINDOW,
        "final_logit_softcapping": pico.SOFT_CAP,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    },
    projector_keys={"use_gelu": True, "vision.projector.scale_factor": None},
    changes=(
        Change(
            "defaults of transformers",
            TEXT,
            {"layer_types": None, "rope_parameters": None, "global_head_dim": None},
            {"attention.sliding_window_pattern": [True, True, True, False], "rope.freq_base": 1e6},
        ),
        Change(
            "pooling",
            VISION,
            {"pooling_kernel_size": 2},
            projector={"vision.projector.scale_factor": 2},
        ),
    ),
    pre_tokenizer="gemma4",
    image_token="<|image|>",
    marks=("<|image>", "<image|>"),
    image_tokens=(63, 60, 63),
    activation=lambda gate: gelu(gate, approximate="tanh"),
    ask=prompts.with_processor(prompts.soft_tokens),
    token_types=True,
    pictures=(pico.PICTURE,),
    text_length=2 * pico.WINDOW,
    text_kl=1e-6,  # llama.cpp reads GELU from a table in F16
    stock=(StockDifference("no activation", "mmproj", 1e-5, left_out=("clip.use_gelu",)),),
    measured=MeasuredChange(
        (
            *("blk.3.ffn_gate_up_exps.weight", "blk.3.ffn_down_exps.weight", "blk.3.attn_k.weight"),
            *("blk.2.ffn_down.weight", "token_embd.weight"),
        ),
        samples=(1, 4),
        rtol=5e-3,
        draws=8,
        fisher=(0.4, 2.5),
        reroutes=frozenset({("token_embd.weight", 0)}),
    ),
    conversion=Conversion(
        3.3,
        FEW,
        reached=0.98,
        log="model.audio_tower.output_proj.weight and 0 more tensors are left out",
        f32="blk.0.ffn_down_exps.scale rope_freqs.weight",
        quantized="blk.0.attn_k blk.0.ffn_gate_up_exps",
        among=("ffn_down_exps", "IQ4_NL Q5_0 Q5_1"),
        alone=True,
    ),
)
