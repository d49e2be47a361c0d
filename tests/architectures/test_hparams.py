"""Typed hyperparameters: what is read, what is refused, and what the message says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mode_gguf.architectures.hparams import config, image_hparams, text_hparams, vision_hparams
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError


def checkpoint_of(folder: Path, **settings: Any) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({"w": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def text_of(folder: Path, **settings: Any) -> Any:
    return text_hparams(checkpoint_of(folder, text_config=settings), {"n_group": 1}, "somemoe")


def test_the_first_name_that_is_there_is_read(tmp_path: Path) -> None:
    text = text_of(tmp_path, num_local_experts=None, n_routed_experts=8, rope_theta=10_000, flag=False, names=["a"])
    assert text.int("num_experts", "num_local_experts", "n_routed_experts") == 8
    assert (text.float("rope_theta"), type(text.float("rope_theta"))) == (10_000.0, float)
    assert text.bool("flag") is False
    assert text.list("names") == ["a"]
    assert text.int("n_group") == 1
    assert not text.has("num_local_experts")


@pytest.mark.parametrize(
    ("kind", "value"), [("int", "8"), ("int", 8.0), ("int", True), ("float", True), ("bool", 1), ("list", "ab")]
)
def test_another_type_is_refused(tmp_path: Path, kind: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"config\.json: x is .*expected {kind}; use the configuration published"):
        getattr(text_of(tmp_path, x=value), kind)("x")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: a or b \(int\) is missing"):
        text_of(tmp_path, a=None).int("a", "b")
    with pytest.raises(InputError, match="expected an object vision_config, found None"):
        vision_hparams(checkpoint_of(tmp_path))


def test_the_text_model_under_another_name(tmp_path: Path) -> None:
    assert text_hparams(checkpoint_of(tmp_path, llm_config={"a": 1}, text_config={"a": 2})).int("a") == 1


class TestExpectations:
    def test_the_value_that_is_wanted(self, tmp_path: Path) -> None:
        text = text_of(tmp_path, hidden_act="silu")
        text.expect("hidden_act", "silu", "always gates with silu")
        text.expect("attention_bias", False, "has no attention biases")

    def test_another_value_is_refused_with_its_reason(self, tmp_path: Path) -> None:
        message = r"config\.json: hidden_act is 'gelu', expected 'silu': llama\.cpp's somemoe always gates with silu;"
        with pytest.raises(InputError, match=message):
            text_of(tmp_path, hidden_act="gelu").expect("hidden_act", "silu", "always gates with silu")

    def test_an_absent_value_has_transformers_default(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="norm_topk_prob is False, expected True"):
            text_of(tmp_path).expect("norm_topk_prob", True, "always renormalises", default=False)
        with pytest.raises(InputError, match="hidden_act is None, expected 'silu'"):
            text_of(tmp_path, hidden_act=None).expect("hidden_act", "silu", "always gates with silu")

    def test_parts_are_told_apart(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(tmp_path, vision_config={"hidden_act": "relu"}, select_layer=-4)
        with pytest.raises(InputError, match=r"config\.json: vision hidden_act is 'relu'"):
            vision_hparams(checkpoint).expect("hidden_act", "gelu", "uses this activation")
        with pytest.raises(InputError, match=r"config\.json: select_layer is -4"):
            config(checkpoint).expect("select_layer", -1, "takes the last layer")


def test_settings_of_the_image_processor(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    with pytest.raises(InputError, match=r"preprocessor_config\.json: no such file"):
        image_hparams(checkpoint)
    new, old = tmp_path / "processor_config.json", tmp_path / "preprocessor_config.json"
    new.write_text(json.dumps({"image_processor": None}))
    with pytest.raises(InputError, match=r"processor_config\.json: expected an object image_processor"):
        image_hparams(checkpoint)
    new.write_text(json.dumps({"image_processor": {"max_patches": 3}}))
    assert image_hparams(checkpoint, {"pad_input": True}).values == {"pad_input": True, "max_patches": 3}
    old.write_text(json.dumps({"max_patches": 4, "media_proc_cfg": {"max_patches": 5}}))
    assert image_hparams(checkpoint).int("max_patches") == 5
