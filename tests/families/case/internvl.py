"""InternVL3.5-MoE."""

import numpy as np

from mode_gguf.architectures import projector_tensors
from tests.families import prompts
from tests.families.case.shared import OUTSIDE, QWEN3_LAYER, QWEN3_PARAMETERS, SOME, table_gelu
from tests.families.family_case import Change, Conversion, FamilyCase, StockDifference, weights
from tests.families.pico import internvl as pico
from tests.families.pico import qwen3_vl_moe as pico_qwen3_vl
from tests.families.refusal import TEXT, VISION, Refusal, of_rope, refused_ropes, unlike

INTERNVL = FamilyCase(
    name="internvl",
    refusals=(
        *unlike("llm_config", norm_topk_prob=False, hidden_act="gelu", attention_bias=True, mlp_only_layers=[0]),
        *unlike("llm_config", decoder_sparse_step=2, use_sliding_window=True),
        *unlike(VISION, qk_normalization=True, norm_type="rms_norm", image_size=[448, 224]),
        *unlike(None, ps_version="v1", select_layer=-4, dynamic_image_size=False, use_thumbnail=False),
        *unlike(None, pad2square=True, downsample_ratio=0.3, min_dynamic_patch=0),
        *of_rope("rope_scaling", "llm_config", r"\w+", *refused_ropes()),
        *unlike(TEXT, layout="pico_internvl_hf", norm_topk_prob=False),
        *unlike(VISION, layout="pico_internvl_hf", use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False),
        *unlike(VISION, layout="pico_internvl_hf", use_mask_token=True, use_absolute_position_embeddings=False),
        *unlike(None, layout="pico_internvl_hf", vision_feature_layer=-2, vision_feature_select_strategy="full"),
        *unlike(None, layout="pico_internvl_hf", projector_hidden_act="relu"),
        *(
            Refusal("llm_config", settings, f"llm_config is of {says}")
            for settings, says in (
                (
                    {"architectures": ["Qwen3ForCausalLM"], "num_experts": None},
                    "'Qwen3ForCausalLM'.*convert_hf_to_gguf",
                ),
                (
                    {"architectures": ["InternLM2ForCausalLM"], "num_experts": None},
                    "'InternLM2ForCausalLM'.*not a Mixture",
                ),
                (
                    {"architectures": ["GptOssForCausalLM"]},
                    "'GptOssForCausalLM', expected 'Qwen3MoeForCausalLM'; of Inter",
                ),
                ({"architectures": None, "model_type": "gpt_oss"}, "'gpt_oss', expected"),
            )
        ),
        Refusal(
            VISION,
            {"image_size": 112},
            r"position_embedding has shape \[1, 17, 64\], expected \[1, 65, 64\]",
            projector_tensors,
        ),
        Refusal(VISION, {"qkv_bias": False}, r"layers\.0\.attn\.qkv\.bias \[192\] has no place", projector_tensors),
    ),
    pico=pico,
    write=pico.write_pico_internvl,
    layouts=("pico_internvl", "pico_internvl_hf"),
    transformers_layout="pico_internvl_hf",
    tied=True,
    gguf_arch="qwen3moe",
    projector_type="internvl",
    outside=OUTSIDE,
    layers=(QWEN3_LAYER,) * 3,
    vision=weights("v.class_embd= v.patch_embd.* v.position_embd mm.model.mlp.0.* mm.model.mlp.1.* mm.model.mlp.3.*"),
    vision_block=weights("ln1.* attn_q.* attn_k.* attn_v.* attn_out.* ls1 ln2.* ffn_up.* ffn_down.* ls2"),
    vision_blocks=pico.BLOCKS,
    parameters={
        **QWEN3_PARAMETERS,
        "v.class_embd": "model.vision_tower.embeddings.cls_token",
        "v.patch_embd.weight": "model.vision_tower.embeddings.patch_embeddings.projection.weight",
        "v.patch_embd.bias": "model.vision_tower.embeddings.patch_embeddings.projection.bias",
        "v.position_embd.weight": "model.vision_tower.embeddings.position_embeddings",
        "v.blk.{n}.ls1.weight": "model.vision_tower.encoder.layer.{n}.lambda_1",
        "v.blk.{n}.ls2.weight": "model.vision_tower.encoder.layer.{n}.lambda_2",
    }
    | {
        f"{ours}.{part}": f"model.{theirs}.{part}"
        for part in ("weight", "bias")
        for ours, theirs in {
            "v.blk.{n}.ln1": "vision_tower.encoder.layer.{n}.layernorm_before",
            "v.blk.{n}.attn_q": "vision_tower.encoder.layer.{n}.attention.q_proj",
            "v.blk.{n}.attn_k": "vision_tower.encoder.layer.{n}.attention.k_proj",
            "v.blk.{n}.attn_v": "vision_tower.encoder.layer.{n}.attention.v_proj",
            "v.blk.{n}.attn_out": "vision_tower.encoder.layer.{n}.attention.projection_layer",
            "v.blk.{n}.ln2": "vision_tower.encoder.layer.{n}.layernorm_after",
            "v.blk.{n}.ffn_up": "vision_tower.encoder.layer.{n}.mlp.fc1",
            "v.blk.{n}.ffn_down": "vision_tower.encoder.layer.{n}.mlp.fc2",
            "mm.model.mlp.0": "multi_modal_projector.layer_norm",
            "mm.model.mlp.1": "multi_modal_projector.linear_1",
            "mm.model.mlp.3": "multi_modal_projector.linear_2",
        }.items()
    },
    # The checkpoint has the class token's position first, which the stock converter keeps.
    converted={r"v\.position_embd\.weight": lambda table: np.roll(table, -1, axis=1)},
    text_keys={"attention.key_length": pico_qwen3_vl.HEAD_DIM, "rope.freq_base": 1_000_000},
    projector_keys={
        "vision.image_size": pico.SIDE,
        "vision.patch_size": pico.PATCH,
        "vision.projector.scale_factor": 2,
        "vision.preproc_min_tiles": 1,
        "vision.preproc_max_tiles": pico.MAX_TILES,
        "use_gelu": True,
    },
    changes=(
        Change(
            "scaling beyond the trained context",
            "llm_config",
            {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
        ),
    ),
    pre_tokenizer="qwen2",
    image_token="<IMG_CONTEXT>",
    marks=("<img>", "</img>"),
    image_tokens=(28, 28, 28),
    streamed_atol=1e-5,
    ask=prompts.built,
    before_question="\n",
    pictures=((128, 96), (56, 56), (30, 40), (96, 160), (61, 200)),
    rounded=table_gelu("activation_fn", "act"),
    rounded_kl=2e-7,
    stock=(
        StockDifference(
            "class token first",
            "mmproj",
            0.05,
            rewritten={r"v\.position_embd\.weight": lambda table: np.roll(table, 1, axis=1)},
        ),
    ),
    conversion=Conversion(3.0, SOME),
)
