import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, LlamaFileType

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.export.metadata import (
    add_general_keys,
    file_type,
    imatrix_keys,
    main_expert_type,
)
from mode_gguf.quantization.types import QUANT_TYPES, QuantType


def general_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    writer = GGUFWriter(None, "test")
    add_general_keys(writer, checkpoint, text_tensors(checkpoint), kind="model")
    return {key: value.value for key, value in writer.kv_data[0].items()}


def test_main_type_counts_expert_weights_only(pico: Path) -> None:
    tensors = text_tensors(Checkpoint.open(pico))
    types = {tensor.name: QUANT_TYPES["Q8_0"] for tensor in tensors}
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    for tensor, name in zip(experts, ["Q2_K"] * 4 + ["Q3_K"] * 5, strict=True):
        types[tensor.name] = QUANT_TYPES[name]
    assert main_expert_type(tensors, types) == QUANT_TYPES["Q3_K"]


@pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=QUANT_TYPES)
def test_file_type_is_llama_cpps_for_a_file_of_this_type(quant_type: QuantType) -> None:
    nearest = LlamaFileType(file_type(quant_type)).name.removesuffix("_M").partition("_")[2]
    assert nearest == quant_type.name


def test_general_keys(pico: Path) -> None:
    checkpoint = Checkpoint.open(pico)
    found = general_keys(checkpoint)
    weights = sum(tensor.n_weights for tensor in text_tensors(checkpoint) if tensor.role is Role.EXPERT)
    assert found["general.type"] == "model"
    assert found["general.license"] == "apache-2.0"
    assert found["general.tags"] == ["image-text-to-text"]
    assert found["general.quantized_by"] == "mode-gguf"
    assert found["general.quantization_version"] == 2
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == checkpoint.name
    assert found["general.size_label"].startswith("4x")
    assert float(found["general.size_label"][2:-1]) * 1e6 >= weights / 4


def test_a_snapshot_of_the_hub_names_its_repository(pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "models--Lab--Nice-VL-30B-A3B-Instruct" / "snapshots" / "0123abcd")
    found = general_keys(Checkpoint.open(folder))
    assert found["general.name"] == "Nice VL 30B A3B Instruct"
    assert found["general.basename"] == "Nice-VL"
    assert found["general.size_label"] == "30B-A3B"
    assert found["general.base_model.0.organization"] == "Lab"
    assert found["general.base_model.0.repo_url"].endswith("/Lab/Nice-VL-30B-A3B-Instruct")


@pytest.mark.parametrize("card", [b"---\nlicense: [unclosed\n---\n", b"---\n\xff\n---\n"])
def test_unreadable_model_card(pico: Path, tmp_path: Path, card: bytes) -> None:
    folder = shutil.copytree(pico, tmp_path / "checkpoint")
    (folder / "README.md").write_bytes(card)
    with pytest.raises(InputError, match=r"README\.md"):
        general_keys(Checkpoint.open(folder))


def test_imatrix_keys(tmp_path: Path) -> None:
    path = tmp_path / "imatrix-M.gguf"
    write_imatrix(path, {"a": (np.ones((1, 4)), np.ones(1))}, ["wiki", "coco"], chunk_count=7, chunk_size=512)
    assert imatrix_keys(path) == {
        "quantize.imatrix.file": "imatrix-M.gguf",
        "quantize.imatrix.dataset": "wiki, coco",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 7,
    }
