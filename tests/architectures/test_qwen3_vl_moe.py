import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode_gguf.architectures import find_family, projector_tensors, qwen3_vl_moe, qwen_vision, text_tensors
from mode_gguf.architectures.tensors import Role, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from tests.families.pico import qwen3_vl_moe as sizes
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

EXPERTS, WIDTH, HIDDEN = 4, 512, sizes.HIDDEN


def changed(folder: Path, target: Path, section: str | None = None, **settings: Any) -> Checkpoint:
    """A copy of a checkpoint with other settings in config.json; None removes one."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    where = config[section] if section else config
    for key, value in settings.items():
        where.pop(key, None)
        if value is not None:
            where[key] = value
    (target / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(target)


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights as transformers holds them after loading: (E, 2I, H) and (E, H, I)."""
    import torch
    from transformers import Qwen3VLMoeForConditionalGeneration

    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("layout", ["pico", "pico_module"])
def test_experts_are_those_transformers_computes_with(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    state = module_state(folder)
    tensors = {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(folder))}
    for layer in range(3):
        gate_up = state[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"]
        expected = {
            "gate": gate_up[:, :WIDTH],
            "up": gate_up[:, WIDTH:],
            "down": state[f"model.language_model.layers.{layer}.mlp.experts.down_proj"],
        }
        for projection, weights in expected.items():
            tensor = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert tensor.shape == weights.shape
            assert (tensor.layer, tensor.projection, tensor.n_experts) == (layer, projection, EXPERTS)
            for expert in range(EXPERTS):
                matrix = tensor.read(expert)
                assert matrix.dtype == np.uint16, "transposing must not widen"
                assert matrix.flags.c_contiguous
                np.testing.assert_array_equal(as_float32(matrix), weights[expert])
                np.testing.assert_array_equal(tensor.read(expert, slice(3, 7)), matrix[3:7])


def test_every_other_tensor_is_stored_as_it_is(pico: Path) -> None:
    state = module_state(pico)
    for tensor in text_tensors(Checkpoint.open(pico)):
        if tensor.role is not Role.EXPERT:
            (source,) = tensor.sources
            np.testing.assert_array_equal(as_float32(tensor.read(0)), state[source])
            np.testing.assert_array_equal(as_float32(tensor.read(0, slice(1, 3))), state[source][1:3])
            assert tensor.shape == state[source].shape


def test_roles_layers_and_activations(pico: Path) -> None:
    tensors = {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(pico))}
    expected = {
        "token_embd.weight": (Role.EMBEDDING, None, None),
        "blk.1.attn_norm.weight": (Role.KEEP, 1, None),
        "blk.1.attn_q.weight": (Role.DENSE, 1, "blk.1.attn_q.weight"),
        "blk.1.attn_output.weight": (Role.DENSE, 1, "blk.1.attn_output.weight"),
        "blk.1.ffn_gate_inp.weight": (Role.KEEP, 1, None),
        "blk.1.ffn_gate_exps.weight": (Role.EXPERT, 1, "blk.1.ffn_exps.input"),
        "blk.1.ffn_up_exps.weight": (Role.EXPERT, 1, "blk.1.ffn_exps.input"),
        "blk.1.ffn_down_exps.weight": (Role.EXPERT, 1, "blk.1.ffn_exps.hidden"),
        "output_norm.weight": (Role.KEEP, None, None),
        "output.weight": (Role.OUTPUT, None, "output.weight"),
    }
    assert {name: (tensors[name].role, tensors[name].layer, tensors[name].activation) for name in expected} == expected
    assert tensors["blk.1.attn_q.weight"].sources == ("model.language_model.layers.1.self_attn.q_proj.weight",)
    assert [name for name in tensors if name.startswith("blk.")] == sorted(
        (name for name in tensors if name.startswith("blk.")), key=lambda name: int(name.split(".")[1])
    ), "layers stay together"


def test_reading_an_expert_reads_nothing_else(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(pico))}
    read, sizes_read = Checkpoint.read, []

    def recording(self: Checkpoint, name: str, index: Any = None) -> np.ndarray:
        array = read(self, name, index)
        sizes_read.append(array.size)
        return array

    monkeypatch.setattr(Checkpoint, "read", recording)
    for projection in ("gate", "up", "down"):
        tensors[f"blk.0.ffn_{projection}_exps.weight"].read(1)
    assert sizes_read == [WIDTH * HIDDEN] * 3


def test_projector_tensors(pico: Path) -> None:
    state = module_state(pico)
    tensors = {tensor.name: tensor for tensor in projector_tensors(Checkpoint.open(pico))}
    kernel = state["model.visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(as_float32(tensors["v.patch_embd.weight"].read(0)), kernel[:, :, 0])
    np.testing.assert_array_equal(as_float32(tensors["v.patch_embd.weight.1"].read(0)), kernel[:, :, 1])
    np.testing.assert_array_equal(as_float32(tensors["v.patch_embd.weight.1"].read(0, slice(2, 5))), kernel[2:5, :, 1])
    for name, source in {
        "v.deepstack.0.fc1.weight": "model.visual.deepstack_merger_list.0.linear_fc1.weight",
        "v.deepstack.2.fc2.bias": "model.visual.deepstack_merger_list.1.linear_fc2.bias",
        "v.blk.2.ffn_down.weight": "model.visual.blocks.2.mlp.linear_fc2.weight",
        "mm.2.weight": "model.visual.merger.linear_fc2.weight",
        "v.post_ln.bias": "model.visual.merger.norm.bias",
    }.items():
        np.testing.assert_array_equal(as_float32(tensors[name].read(0)), state[source])
    assert {tensor.layer for tensor in tensors.values()} == {None}


class TestSquareExperts:
    """I = 256 = H makes down_proj square, 2I = 256 = H makes gate_up_proj square."""

    @pytest.mark.parametrize("width", [128, 256])
    @pytest.mark.parametrize("layout", ["public", "module"])
    def test_the_version_decides(self, tmp_path: Path, width: int, layout: sizes.Layout) -> None:
        folder = write_pico_qwen3vlmoe(tmp_path / "square", layout=layout, expert_width=width)
        other = write_pico_qwen3vlmoe(
            tmp_path / "other", layout="public" if layout == "module" else "module", expert_width=width
        )
        found, wanted = (text_tensors(Checkpoint.open(path)) for path in (folder, other))
        for tensor, expected in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(tensor.read(0), expected.read(0), err_msg=tensor.name)

    def test_without_a_version_they_are_refused(self, tmp_path: Path) -> None:
        folder = write_pico_qwen3vlmoe(tmp_path / "square", expert_width=256)
        checkpoint = changed(folder, tmp_path / "unknown", transformers_version=None)
        with pytest.raises(InputError, match=r"transformers_version is missing.*down_proj"):
            text_tensors(checkpoint)


def test_tied_embeddings_have_no_output_tensor(tmp_path: Path) -> None:
    tied = text_tensors(Checkpoint.open(write_pico_qwen3vlmoe(tmp_path, tied=True)))
    assert "output.weight" not in {tensor.name for tensor in tied}
    assert "token_embd.weight" in {tensor.name for tensor in tied}


def test_text_metadata(pico: Path, pico_module: Path) -> None:
    """Both spellings of the rotary settings and of the number of experts."""
    old, new = (qwen3_vl_moe.text_metadata(Checkpoint.open(folder)) for folder in (pico, pico_module))
    assert old == new
    assert old["qwen3vlmoe.rope.freq_base"] == 5_000_000.0
    assert old["qwen3vlmoe.rope.dimension_sections"] == [12, 10, 10, 0]
    assert old["qwen3vlmoe.expert_count"] == EXPERTS
    assert old["qwen3vlmoe.expert_feed_forward_length"] == WIDTH
    assert old["qwen3vlmoe.n_deepstack_layers"] == 2


def test_projector_metadata_from_processor_config(pico: Path, tmp_path: Path) -> None:
    """transformers 5 saves the image processor's settings inside processor_config.json."""
    folder = shutil.copytree(pico, tmp_path / "checkpoint")
    image = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    assert qwen_vision.projector_metadata(Checkpoint.open(folder)) == qwen_vision.projector_metadata(
        Checkpoint.open(pico)
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("norm_topk_prob", False),
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("mlp_only_layers", [1]),
            ("decoder_sparse_step", 2),
            ("rope_scaling", {"rope_type": "yarn", "mrope_section": [12, 10, 10]}),
        ],
    )
    def test_what_llama_cpp_would_run_differently(self, pico: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico, tmp_path / "other", "text_config", **{setting: value})
        name = "rope_type" if setting == "rope_scaling" else setting
        with pytest.raises(InputError, match=rf"{name} is .*expected"):
            find_family(checkpoint)

    def test_as_many_deepstack_mergers_as_layers(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="2 DeepStack mergers for 2 decoder layers"):
            find_family(Checkpoint.open(write_pico_qwen3vlmoe(tmp_path, layers=2)))

    def test_tensor_without_a_place(self, pico: Path, tmp_path: Path) -> None:
        """A layer more than config.json says."""
        checkpoint = changed(pico, tmp_path / "other", "text_config", num_hidden_layers=None)
        with pytest.raises(InputError, match=r"num_hidden_layers \(int\) is missing"):
            text_tensors(checkpoint)
        deeper = write_pico_qwen3vlmoe(tmp_path / "deeper", layers=4)
        with pytest.raises(InputError, match=r"layers\.3\.\S+ \[.*\] has no place"):
            text_tensors(changed(deeper, tmp_path / "shallow", "text_config", num_hidden_layers=3))

    def test_missing_tensor(self, pico: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"layers\.3\.input_layernorm\.weight is missing"):
            text_tensors(changed(pico, tmp_path / "deeper", "text_config", num_hidden_layers=4))

    def test_experts_of_another_shape(self, pico: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"gate_up_proj has shape \[4, 256, 1024\], expected \[5, 256, 1024\]"):
            text_tensors(changed(pico, tmp_path / "other", "text_config", num_experts=5))

    @pytest.mark.parametrize("value", ["4", 4.0, True, [4]])
    def test_mistyped_setting(self, pico: Path, tmp_path: Path, value: Any) -> None:
        with pytest.raises(InputError, match=r"num_experts is .*expected int"):
            text_tensors(changed(pico, tmp_path / "other", "text_config", num_experts=value))
