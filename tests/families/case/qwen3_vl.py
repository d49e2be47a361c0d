"""Qwen3-VL-MoE."""

from mode_gguf.architectures import text_tensors
from tests.families.case.shared import FRAMES, QWEN, QWEN3_LAYER, QWEN3_PARAMETERS, QWEN_VISION, table_gelu
from tests.families.family_case import FamilyCase, weights
from tests.families.pico import qwen3_vl_moe as pico
from tests.families.refusal import TEXT, VISION, Refusal, of_rope, refused_ropes, unlike

DEEPSTACK = weights(" ".join(f"v.deepstack.{tap}.{part}.*" for tap in (0, 2) for part in ("norm", "fc1", "fc2")))
QWEN3_VL = FamilyCase(
    name="qwen3-vl",
    refusals=(
        *unlike(TEXT, norm_topk_prob=False, hidden_act="gelu", attention_bias=True, mlp_only_layers=[1]),
        *unlike(TEXT, decoder_sparse_step=2),
        *of_rope("rope_scaling", TEXT, r"\w+", *refused_ropes(mrope_section=[12, 10, 10])),
        *of_rope("rope_scaling", TEXT, "mrope_section", {"mrope_section": [12, 10]}, {"mrope_section": [8, 8, 8, 8]}),
        *of_rope("rope_parameters", VISION, r"vision rope_\w+", {"rope_theta": 1e6}, {"type": "linear", "factor": 2.0}),
        *unlike(VISION, names="vision ", rope_theta=1e6),
        *unlike(TEXT, mrope_section=[24, 20, 20], partial_rotary_factor=0.5),
        Refusal(TEXT, {"num_hidden_layers": None}, r"num_hidden_layers \(int\) is missing", text_tensors),
        Refusal(TEXT, {"num_hidden_layers": 4}, r"layers\.3\.input_layernorm\.weight is missing", text_tensors),
        Refusal(
            TEXT,
            {"num_experts": 5},
            r"gate_up_proj has shape \[4, 256, 1024\], expected \[5, 256, 1024\]",
            text_tensors,
        ),
        *(
            Refusal(TEXT, {"num_experts": value}, r"num_experts is .*expected int", text_tensors)
            for value in ("4", 4.0, True, [4])
        ),
    ),
    pico=pico,
    write=pico.write_pico_qwen3vlmoe,
    layouts=("pico", "pico_module"),
    gguf_arch="qwen3vlmoe",
    layers=(QWEN3_LAYER,) * 3,
    vision=(*QWEN_VISION, *DEEPSTACK),
    parameters={
        **QWEN3_PARAMETERS,
        "v.deepstack.0.fc1.weight": "model.visual.deepstack_merger_list.0.linear_fc1.weight",
        "v.deepstack.2.fc2.bias": "model.visual.deepstack_merger_list.1.linear_fc2.bias",
        "v.blk.{n}.ffn_down.weight": "model.visual.blocks.{n}.mlp.linear_fc2.weight",
        "mm.2.weight": "model.visual.merger.linear_fc2.weight",
        "v.post_ln.bias": "model.visual.merger.norm.bias",
    },
    converted=FRAMES,
    text_keys={"rope.freq_base": 5e6, "rope.dimension_sections": [12, 10, 10, 0], "n_deepstack_layers": 2},
    projector_keys={"vision.is_deepstack_layers": [True, False, True], "vision.patch_size": pico.PATCH},
    pre_tokenizer="qwen2",
    streamed_atol=2e-5,
    sums_rtol=1e-4,
    text_kl=1e-9,
    rounded=table_gelu("act_fn", under="model.visual"),
    **QWEN,
)
