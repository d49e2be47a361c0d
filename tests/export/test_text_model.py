import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, ValidationError
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.gguf.header import read_header
from mode_gguf.llama_cpp.engines import Engine
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.quantization.expert_groups import group_name
from mode_gguf.quantization.types import QUANT_TYPES
from tests.export.uniform import all_in, write_all_in
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

EXPERTS = "blk.0.ffn_down_exps.weight"


def test_full_precision_is_the_checkpoint(pico: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico)
    path = tmp_path / "model.gguf"
    write_all_in(path, checkpoint, "F32", metadata={"mode.plan": "test"})
    reader = GGUFReader(path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert list(found) == [tensor.name for tensor in text_tensors(checkpoint)]
    for tensor in text_tensors(checkpoint):
        weights = np.stack([as_float32(tensor.read(expert)) for expert in range(tensor.n_experts)])
        np.testing.assert_array_equal(found[tensor.name], weights.reshape(tensor.shape), err_msg=tensor.name)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "qwen3vlmoe"
    assert keys["general.file_type"] == 0
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["mode.plan"] == "test"


def test_both_layouts_give_the_same_tensors(pico: Path, pico_module: Path, tmp_path: Path) -> None:
    files = []
    for folder in (pico, pico_module):
        checkpoint = Checkpoint.open(folder)
        path = tmp_path / folder.name
        write_all_in(path, checkpoint, "BF16", threads=2)
        files.append({tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors})
    assert files[0] == files[1]


def test_types_and_importance_reach_the_packer(pico: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico)
    types = all_in(checkpoint, "BF16") | {EXPERTS: QUANT_TYPES["Q3_K"]}
    importance = {EXPERTS: np.ones((4, 512), np.float32)}
    importance[EXPERTS][2, :256] = 1000
    data = []
    for name, used in (("plain", None), ("weighted", importance)):
        write_text_model(tmp_path / name, checkpoint, TensorPacking(types, used))
        tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / name).tensors}
        assert tensors[EXPERTS].tensor_type.name == "Q3_K"
        assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
        data.append(tensors[EXPERTS].data)
    assert (data[0][2] != data[1][2]).any()


def test_experts_with_types_of_their_own(pico: Path, tmp_path: Path) -> None:
    """Every expert has the bytes it has in a file of its type; keys say what the file is, and stock refuses it."""
    checkpoint = Checkpoint.open(pico)
    whole = [tensor for tensor in text_tensors(checkpoint) if tensor.role is Role.EXPERT and tensor.layer == 0]
    names = ("Q3_K", "Q2_K", "Q3_K", "Q4_K")
    experts = {tensor.name: [QUANT_TYPES[name] for name in names] for tensor in whole}
    importance = {EXPERTS: np.random.default_rng(0).random((4, 512), np.float32)}
    path = tmp_path / "groups.gguf"
    write_text_model(
        path, checkpoint, TensorPacking(all_in(checkpoint, "Q8_0"), importance, experts=experts), threads=2
    )
    header = read_header(path)
    assert header.metadata["general.architecture"] == "qwen3vlmoe+expert_groups"
    assert header.metadata["expert_groups.version"] == 1
    assert header.metadata["qwen3vlmoe.expert_count"] == 4
    assert header.n_weights == sum(tensor.n_weights for tensor in text_tensors(checkpoint))
    grouped = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    places = grouped["blk.0.ffn_exps_map.weight"]
    assert places.data.tolist() == [[0, -1, 1, -1], [-1, 0, -1, -1], [-1, -1, -1, 0]]
    assert "blk.1.ffn_exps_map.weight" not in grouped
    for name in set(names):
        types = all_in(checkpoint, "Q8_0") | {tensor.name: QUANT_TYPES[name] for tensor in whole}
        write_text_model(tmp_path / name, checkpoint, TensorPacking(types, importance))
        uniform = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / name).tensors}
        for tensor in whole:
            group = ("Q3_K", "Q2_K", "Q4_K").index(name)
            found = grouped[group_name(tensor.name, group)]
            assert found.tensor_type.name == name
            members = [expert for expert, own in enumerate(names) if own == name]
            np.testing.assert_array_equal(found.data, uniform[tensor.name][members])
    stock = Engine("embedded")
    with pytest.raises(ValidationError, match=r"unknown model architecture: 'qwen3vlmoe\+expert_groups'"):
        LlamaModel(path, engine=stock)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "quant_type", "words"),
        [
            ("output.weight", None, r"no type for output\.weight"),
            ("other.weight", "F32", r"other\.weight, which the model does not have"),
            ("output_norm.weight", "F16", r"output_norm\.weight .*must stay F32"),
            (
                "output.weight",
                "IQ2_XXS",
                r"output\.weight type IQ2_XXS, which needs an importance matrix.* run `mode-gguf calibrate`",
            ),
        ],
    )
    def test_types(self, pico: Path, tmp_path: Path, name: str, quant_type: str | None, words: str) -> None:
        checkpoint = Checkpoint.open(pico)
        types = all_in(checkpoint, "F32")
        types.pop(name, None)
        if quant_type is not None:
            types[name] = QUANT_TYPES[quant_type]
        with pytest.raises(InputError, match=words):
            write_text_model(tmp_path / "m.gguf", checkpoint, TensorPacking(types))
        assert list(tmp_path.iterdir()) == []

    def test_blocks_that_do_not_fit(self, tmp_path: Path) -> None:
        folder = write_pico_qwen3vlmoe(tmp_path / "narrow", expert_width=96)
        checkpoint = Checkpoint.open(folder)
        types = all_in(checkpoint, "Q8_0") | {EXPERTS: QUANT_TYPES["Q3_K"]}
        with pytest.raises(InputError, match=r"ffn_down_exps.*blocks of 256 do not fit rows of 96"):
            write_text_model(tmp_path / "m.gguf", checkpoint, TensorPacking(types))

    def test_importance_of_another_model(self, pico: Path, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(pico)
        with pytest.raises(InputError, match=r"shape \(8, 512\) for blk\.0\.ffn_down_exps"):
            write_text_model(
                tmp_path / "m.gguf",
                checkpoint,
                TensorPacking(all_in(checkpoint, "F32"), {EXPERTS: np.ones((8, 512), np.float32)}),
            )

    @pytest.mark.parametrize("tensor", ["model.language_model.norm.weight", "lm_head.weight"])
    def test_nan_weights(self, pico: Path, tmp_path: Path, tensor: str) -> None:
        checkpoint = Checkpoint.open(shutil.copytree(pico, tmp_path / "damaged"))
        stored = checkpoint.tensors[tensor]
        with stored.file.open("r+b") as file:
            file.seek(stored.offset + 20)
            file.write(b"\xc0\x7f")
        gguf_name = next(t.name for t in text_tensors(checkpoint) if tensor in t.sources)
        with pytest.raises(InputError, match=f"{tensor}|{gguf_name}".replace(".", r"\.")):
            write_all_in(tmp_path / "out" / "m.gguf", checkpoint, "F32")
        assert list((tmp_path / "out").iterdir()) == []
