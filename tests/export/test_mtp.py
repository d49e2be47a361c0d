"""The file for multi-token prediction: every tensor of the block, in types that llama.cpp loads."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from mode_gguf.architectures import mtp_tensors
from mode_gguf.architectures.tensors import as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.export.mtp import write_mtp
from mode_gguf.llama_cpp import c_api
from tests.families.changed import changed
from tests.families.pico.qwen3_5_moe import LAYERS, MTP_NORMS, write_pico_qwen3_5_moe

BLOCK = f"blk.{LAYERS}"


@pytest.fixture(scope="module", params=["public", "resaved"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("mtp") / "pico"
    return Checkpoint.open(write_pico_qwen3_5_moe(folder, layout=request.param, mtp=True))


def test_tensors_are_those_of_the_block(checkpoint: Checkpoint) -> None:
    tensors = {tensor.name: tensor for tensor in mtp_tensors(checkpoint)}

    def stored(name: str) -> np.ndarray:
        return as_float32(checkpoint.read(name))

    for source, name in zip(MTP_NORMS, ("shared_head_norm", "enorm", "hnorm"), strict=True):
        read = as_float32(tensors[f"{BLOCK}.nextn.{name}.weight"].read(0))
        np.testing.assert_array_equal(read, stored(f"mtp.{source}.weight") + np.float32(1))
    for source, name in {
        "fc": "nextn.eh_proj",
        "layers.0.self_attn.q_proj": "attn_q",
        "layers.0.mlp.shared_expert.down_proj": "ffn_down_shexp",
        "layers.0.mlp.gate": "ffn_gate_inp",
    }.items():
        read = as_float32(tensors[f"{BLOCK}.{name}.weight"].read(0))
        np.testing.assert_array_equal(read, stored(f"mtp.{source}.weight"))
    used = {source for tensor in tensors.values() for source in tensor.sources}
    assert {name for name in checkpoint.tensors if name.startswith("mtp.")} <= used
    assert {"model.language_model.embed_tokens.weight", "lm_head.weight"} <= used


@pytest.mark.parametrize("quant_type", ["Q8_0", "Q4_K", "F32"])
def test_llama_cpp_loads_it(checkpoint: Checkpoint, quant_type: str, tmp_path: Path) -> None:
    path = tmp_path / "mtp.gguf"
    write_mtp(path, checkpoint, quant_type, threads=2)
    file = GGUFReader(path)
    assert file.fields["qwen35moe.nextn_predict_layers"].contents() == 1
    assert file.fields["qwen35moe.block_count"].contents() == LAYERS + 1
    assert file.fields["qwen35moe.attention.recurrent_layers"].contents()[-1] is False
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert types[f"{BLOCK}.ffn_down_exps.weight"] == types["token_embd.weight"] == quant_type
    assert types[f"{BLOCK}.nextn.enorm.weight"] == types[f"{BLOCK}.ffn_gate_inp.weight"] == "F32"
    lib = c_api.library()
    params = lib.llama_model_default_params()
    params.load_mtp = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, c_api.last_errors()
    lib.llama_model_free(model)


def test_what_cannot_be_drafted_with(checkpoint: Checkpoint, pico: Path, tmp_path: Path) -> None:
    path = tmp_path / "mtp.gguf"
    with pytest.raises(UsageError, match=r"unknown type 'Q2_K'.*choose from Q8_0"):
        write_mtp(path, checkpoint, "Q2_K")
    with pytest.raises(InputError, match=r"multi-token prediction of Qwen3VLMoe\w+ is not supported"):
        write_mtp(path, Checkpoint.open(pico))
    without = Checkpoint.open(write_pico_qwen3_5_moe(tmp_path / "without"))
    with pytest.raises(InputError, match=r"no tensor's name begins with mtp\.; .*without a block"):
        write_mtp(path, without)
    two = changed(checkpoint.path, tmp_path / "two", "text_config", mtp_num_hidden_layers=2)
    with pytest.raises(InputError, match="mtp_num_hidden_layers is 2, expected 1"):
        write_mtp(path, two)
    assert not path.exists()
