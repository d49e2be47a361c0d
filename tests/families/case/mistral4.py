"""Mistral Small 4."""

import numpy as np
import pytest
from torch import nn

from tests.e2e.conftest import settings
from tests.families import prompts
from tests.families.case.shared import FEW, OUTSIDE, SHARED_EXPERTS, TableGelu, absorbed
from tests.families.family_case import Change, Conversion, FamilyCase, MeasuredChange, StockDifference, block, weights
from tests.families.pico import mistral4 as pico
from tests.families.pico.tokenizer import VOCAB
from tests.families.refusal import TEXT, VISION, Refusal, of_rope, unlike


def neighbours(array: np.ndarray) -> np.ndarray:
    """Pixtral's queries and keys: from the two halves of a head to pairs of neighbours."""
    halves = array.reshape(pico.VISION_HEADS, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def pixtral(model: nn.Module) -> None:
    """The projector's activation, and the one epsilon that llama.cpp has for its norms."""
    projector = model.get_submodule("model.multi_modal_projector")
    projector.act = TableGelu()
    projector.get_submodule("norm").variance_epsilon = 1e-5  # type: ignore[assignment]


MISTRAL_LAYER = block(
    dense=f"attn_q_a attn_q_b attn_kv_a_mqa attn_output {SHARED_EXPERTS}",
    keep="attn_norm attn_q_a_norm attn_kv_a_norm ffn_norm ffn_gate_inp",
    absorbed="attn_k_b attn_v_b",
)
MISTRAL_OLD_ROPE = {key: value for key, value in pico.ROPE.items() if key not in ("rope_theta", "rope_type")}
MISTRAL4 = FamilyCase(
    name="mistral4",
    refusals=(
        *unlike(TEXT, hidden_act="gelu", attention_bias=True, num_key_value_heads=2, first_k_dense_replace=1),
        *unlike(TEXT, n_group=2, rope_interleave=False),
        *(
            Refusal(TEXT, {"rope_parameters": {**pico.ROPE, key: value}}, rf"config\.json: {key} is .*expected")
            for key, value in {
                "rope_type": "default",
                "beta_fast": 16,
                "truncate": False,
                "partial_rotary_factor": 1.0,
            }.items()
        ),
        *unlike(VISION, names="vision ", hidden_act="relu", model_type="siglip"),
        *of_rope("rope_parameters", VISION, "vision rope_theta", {"rope_theta": 500.0}),
        *unlike(None, vision_feature_layer=-2, projector_hidden_act="relu"),
        *(
            Refusal(TEXT, {"model_type": kind}, rf"text model is '{kind}', expected 'mistral4'.*dense models")
            for kind in ("mistral", "ministral3")
        ),
    ),
    pico=pico,
    write=pico.write_pico_mistral4,
    layouts=("pico_mistral4", "pico_mistral4_module"),
    gguf_arch="mistral4",
    projector_type="pixtral",
    outside=OUTSIDE,
    layers=(MISTRAL_LAYER,) * 3,
    vision=weights("v.patch_embd v.pre_ln v.token_embd.img_break= mm.input_norm mm.patch_merger mm.1 mm.2"),
    vision_block=weights("ln1 attn_q attn_k attn_v attn_out ln2 ffn_gate ffn_up ffn_down"),
    converted={
        **absorbed(pico.ATTENTION),
        r"v\.blk\.\d+\.attn_[qk]\.weight": neighbours,
        r"v\.token_embd\.img_break": lambda table: table[pico.token_id("[IMG_BREAK]")],
    },
    text_keys={
        "vocab_size": VOCAB,
        "attention.head_count_kv": 1,
        "attention.key_length": pico.ATTENTION.latent + pico.ATTENTION.rotated,
        "attention.value_length": pico.ATTENTION.latent,
        "attention.key_length_mla": pico.ATTENTION.nope + pico.ATTENTION.rotated,
        "attention.value_length_mla": pico.ATTENTION.value,
        "attention.temperature_scale": 0.1,
        "attention.temperature_length": pico.ORIGINAL_CONTEXT,
        "rope.dimension_count": pico.ATTENTION.rotated,
        "rope.scaling.type": "yarn",
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
        "expert_shared_count": 1,
        "expert_weights_norm": True,
    },
    projector_keys={"use_silu": True},
    changes=(
        Change(
            "rope as transformers 4 wrote it",
            TEXT,
            {
                "rope_parameters": None,
                "rope_theta": pico.ROPE["rope_theta"],
                "rope_scaling": {**MISTRAL_OLD_ROPE, "type": pico.ROPE["rope_type"]},
            },
        ),
        Change(
            "other weights of experts",
            TEXT,
            {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
            {"expert_weights_norm": None, "expert_weights_scale": 2.5},
        ),
        Change("GELU", VISION, {"hidden_act": "gelu"}, projector={"use_gelu": True}),
    ),
    pre_tokenizer="tekken",
    image_token="[IMG]",
    marks=("[INST]", "[IMG_END]"),
    image_tokens=(20, 24, 20),
    ask=prompts.with_processor(prompts.rows_of_pieces, patch_size=pico.PATCH * pico.MERGE),
    pictures=((112, 84),),
    text_repeats=6,
    text_length=4 * pico.ORIGINAL_CONTEXT,
    image_kl=1e-5,
    rounded=pixtral,
    stock=(
        StockDifference(
            "no attention temperature",
            "text",
            1e-5,
            left_out=("mistral4.attention.temperature_scale", "mistral4.attention.temperature_length"),
            unharmed=pico.ORIGINAL_CONTEXT,
        ),
    ),
    measured=MeasuredChange(
        ("blk.1.attn_q_a.weight", "blk.1.attn_q_b.weight", "blk.1.attn_kv_a_mqa.weight", "blk.2.ffn_down_shexp.weight")
    ),
    conversion=Conversion(
        3.0,
        (
            *(*FEW, "--rounding", "nearest"),
            *settings("sensitivity.types=Q2_K,Q4_K", "sensitivity.dense_types=Q2_K,Q4_K,Q8_0"),
        ),
        quantized="blk.0.attn_q_b blk.0.ffn_up_shexp",
        alone=True,
    ),
)
