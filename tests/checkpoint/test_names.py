"""Tensors' names that tell of wrappers, adapters and buffers; adapters in and beside a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from tests.checkpoint.weights import save, save_alone, weights_of

LAYERS = "model.language_model.layers."


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico checkpoint."""
    return shutil.copytree(pico, tmp_path / "checkpoint")


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        save_alone(folder, {change(name): value for name, value in weights_of(folder).items()})

    return rename


def prefixed(prefix: str) -> Callable[[Path], None]:
    return renamed(lambda name: prefix + name)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    return renamed(lambda name: name.replace(old, new))


def adapted(folder: Path) -> None:
    weights = weights_of(folder)
    save_alone(folder, weights | {f"{LAYERS}0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 256)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (prefixed("base_model.model."), r"base_model\.model\..*LoRA adapter around it; merge it"),
        (prefixed("module."), r"'module\.' in its name.*module\.save_pretrained.*strip that"),
        (prefixed("_orig_mod."), r"'_orig_mod\.' in its name.*torch\.compile"),
        (prefixed("module.base_model.model."), r"LoRA adapter around it; merge it"),
        (replaced("layers.0.", "layers.0._checkpoint_wrapped_module."), "activation checkpointing.*strip that"),
        (replaced("layers.0.", "_fsdp_wrapped_module.layers.0."), "FSDP.*strip that"),
        (replaced("q_proj.weight", "q_proj.base_layer.weight"), "LoRA adapter around it; merge it"),
        (adapted, "LoRA adapter around it; merge it"),
        (
            replaced("model.language_model.", "language_model.model."),
            r"language_model\.model\..* is called model\.language_model\..*rename",
        ),
        (replaced("model.language_model.", "model."), r"model\..* is called model\.language_model\..*rename"),
        (replaced("model.language_model.", "language_model."), r"is called model\.language_model\..*rename"),
        (replaced("model.visual.", "visual."), r"visual\..* is called model\.visual\..*rename"),
        (prefixed("thinker."), r"tensor thinker\..* is called .*rename"),
    ],
)
def test_names_with_other_beginnings(folder: Path, change: Callable[[Path], None], says: str) -> None:
    change(folder)
    with pytest.raises(InputError, match=says) as caught:
        text_tensors(Checkpoint.open(folder))
    assert "\n" not in str(caught.value)


def test_what_a_model_computes_is_left_out(folder: Path, pico: Path) -> None:
    weights = weights_of(folder)
    buffers = {
        "model.language_model.rotary_emb.inv_freq": torch.ones(8),
        f"{LAYERS}1.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.visual.rotary_pos_emb.inv_freq": torch.ones(8, dtype=torch.bfloat16),
        "model.language_model.rotary_emb.original_inv_freq": torch.ones(8),
        f"{LAYERS}0.self_attn.masked_bias": torch.tensor(-1e4),
        f"{LAYERS}0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        "model.visual.embeddings.position_ids": torch.arange(16)[None],
        f"{LAYERS}0.self_attn._extra_state": torch.zeros(0, dtype=torch.uint8),
        f"{LAYERS}0.self_attn.rotary_emb.cos_cached": torch.ones(16, 8),
        "model.visual.norm.num_batches_tracked": torch.tensor(3),
    }
    save_alone(folder, weights | buffers)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == Checkpoint.open(pico).tensors.keys()
    assert [tensor.name for tensor in text_tensors(checkpoint)] == [
        tensor.name for tensor in text_tensors(Checkpoint.open(pico))
    ]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.int16])
def test_integers_that_are_no_known_buffer_are_refused(folder: Path, dtype: torch.dtype) -> None:
    save_alone(folder, weights_of(folder) | {f"{LAYERS}0.table": torch.ones(3).to(dtype)})
    with pytest.raises(InputError, match=rf"{LAYERS}0\.table has type .*supported are F32, F16, BF16, F64"):
        Checkpoint.open(folder)


def test_a_bias_is_no_mask(folder: Path) -> None:
    save_alone(folder, weights_of(folder) | {f"{LAYERS}0.attn.bias": torch.ones(16)})
    with pytest.raises(InputError, match=r"attn\.bias .*has no place"):
        text_tensors(Checkpoint.open(folder))


def write_adapter(folder: Path, **settings: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save(folder / "adapter_model.safetensors", {"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("more", [(), ("config.json", "tokenizer.json", "training_args.bin", "optimizer.pt")])
@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"base_model_name_or_path": "Maker/Model\nB"}, " of Maker/Model B"),
        ({}, ""),
        ({"base_model_name_or_path": 3}, ""),
    ],
)
def test_an_adapter_alone(tmp_path: Path, more: tuple[str, ...], settings: dict[str, object], base: str) -> None:
    write_adapter(tmp_path, **settings)
    for name in more:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=rf"only a LoRA adapter \(adapter_config\.json{base}\) found.*merge"):
        Checkpoint.open(tmp_path)


def test_an_adapter_beside_weights(folder: Path, pico: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_adapter(folder)
    checkpoint = Checkpoint.open(folder)
    assert "an adapter lies beside the weights and is left out (adapter_config.json)" in caplog.text
    name = next(iter(checkpoint.tensors))
    np.testing.assert_array_equal(checkpoint.read(name), Checkpoint.open(pico).read(name))
