"""FP8 as llm-compressor writes it: decoded as by hand, and converted as what it stands for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mode_gguf.architectures import projector_tensors, text_tensors
from mode_gguf.architectures.tensors import as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from tests.checkpoint.fp8_copies import STRATEGIES, edited, settings, write_fp8
from tests.checkpoint.weights import save_alone, weights_of
from tests.export.uniform import write_all_in


@pytest.mark.parametrize("section", [None, "text_config"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decoded_as_by_hand(pico: Path, tmp_path: Path, strategy: str, section: str | None) -> None:
    small, plain = (Checkpoint.open(folder) for folder in write_fp8(pico, tmp_path, strategy, section))
    assert small.tensors.keys() == plain.tensors.keys()
    for name in plain.tensors:
        np.testing.assert_array_equal(as_float32(small.read(name)), as_float32(plain.read(name)))
    name = "model.language_model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_array_equal(small.read(name, slice(3, 200)), plain.read(name, slice(3, 200)))
    assert "quantization_config" not in {*small.config, *small.config["text_config"]}
    assert [tensor.name for tensor in text_tensors(small)] == [tensor.name for tensor in text_tensors(plain)]
    assert len(projector_tensors(small)) == len(projector_tensors(plain))


def test_files_are_those_of_what_it_stands_for(pico: Path, tmp_path: Path) -> None:
    written = []
    for folder in write_fp8(pico, tmp_path):
        write_all_in(tmp_path / "text.gguf", Checkpoint.open(folder), "Q4_K")
        written.append((tmp_path / "text.gguf").read_bytes())
    assert written[0] == written[1]


def test_older_spelling(pico: Path, tmp_path: Path) -> None:
    small, plain = write_fp8(pico, tmp_path)
    edited(small, None, lambda config: config.update(compression_config=config.pop("quantization_config")))
    assert Checkpoint.open(small).tensors.keys() == Checkpoint.open(plain).tensors.keys()


def test_formats_by_group_and_naive_ones(pico: Path, tmp_path: Path) -> None:
    small, plain = write_fp8(pico, tmp_path)

    def mixed(config: dict[str, Any]) -> None:
        config["quantization_config"]["format"] = "mixed-precision"
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "naive-quantized"

    edited(small, None, mixed)
    assert Checkpoint.open(small).tensors.keys() == Checkpoint.open(plain).tensors.keys()


def weights(**changes: Any) -> dict[str, Any]:
    group = settings("channel")["config_groups"]["group_0"]
    return {"config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"format": "nvfp4-pack-quantized"} | weights(num_bits=4),
            "compressed-tensors nvfp4-pack-quantized; num_bits 4",
        ),
        ({"format": "int-quantized"} | weights(type="int"), "compressed-tensors int-quantized; num_bits 8, type int"),
        ({"format": "pack-quantized"} | weights(num_bits=4, type="int", symmetric=False), "symmetric False"),
        ({"format": "mxfp4-pack-quantized"} | weights(num_bits=4), "mxfp4"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": None}, "compressed-tensors None"),
        ({"config_groups": []}, "compressed-tensors float-quantized"),
        ({"config_groups": {"a": None}}, "compressed-tensors float-quantized"),
        (weights(strategy="token"), "strategy token"),
        (weights(actorder="group"), "actorder group"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors float-quantized"),
        ({"quant_method": "modelopt"}, "modelopt"),
        ({"quant_method": ["awq"]}, "awq"),
    ],
    ids=str,
)
def test_other_forms_are_refused(pico: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    small, _ = write_fp8(pico, tmp_path)
    edited(small, None, lambda config: config["quantization_config"].update(changes))
    with pytest.raises(InputError, match=rf"already quantized \(.*{says}.*so point to the original model") as caught:
        Checkpoint.open(small)
    assert "\n" not in str(caught.value)


NAME = "model.language_model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (None, rf"{NAME}_scale is missing"),
        (torch.ones(7, 1), rf"{NAME}_scale is F32 \[7, 1\]"),
        (torch.ones(256, 1).long(), rf"{NAME}_scale is I64"),
    ],
)
def test_scales_that_do_not_fit(pico: Path, tmp_path: Path, scale: torch.Tensor | None, says: str) -> None:
    small, _ = write_fp8(pico, tmp_path)
    stored = weights_of(small)
    del stored[f"{NAME}_scale"]
    save_alone(small, stored | ({} if scale is None else {f"{NAME}_scale": scale}))
    with pytest.raises(InputError, match=says):
        Checkpoint.open(small)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(pico: Path, tmp_path: Path, value: float) -> None:
    small, _ = write_fp8(pico, tmp_path)
    stored = weights_of(small)
    stored[f"{NAME}_scale"][5] = value
    save_alone(small, stored)
    with pytest.raises(InputError, match=rf"tensor {NAME}_scale is (NaN|infinite) at row 5, column 0"):
        Checkpoint.open(small).read(NAME, slice(0, 2))


def test_a_checkpoint_that_is_not_compressed_has_no_place_for_its_scales(pico: Path, tmp_path: Path) -> None:
    small, plain = write_fp8(pico, tmp_path)
    scales = {name: value for name, value in weights_of(small).items() if name.endswith("weight_scale")}
    save_alone(small, weights_of(plain) | scales)
    with pytest.raises(InputError, match=r"weight_scale .*has no place"):
        text_tensors(Checkpoint.open(small))
    assert json.loads((small / "config.json").read_text())["quantization_config"]
