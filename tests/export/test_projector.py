import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from mode_gguf.architectures import projector_tensors
from mode_gguf.architectures.tensors import as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.export.projector import PROJECTOR_TYPES, write_projector


def stored_types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def test_full_precision_is_the_checkpoint(pico: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico)
    path = tmp_path / "mmproj.gguf"
    write_projector(path, checkpoint, "F32")
    reader = GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in projector_tensors(checkpoint):
        np.testing.assert_array_equal(found[tensor.name].data, as_float32(tensor.read(0)), err_msg=tensor.name)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "clip"
    assert keys["general.type"] == "mmproj"
    assert keys["clip.projector_type"] == "qwen3vl_merger"
    assert keys["clip.vision.image_size"] == 128
    assert keys["clip.vision.is_deepstack_layers"] == [True, False, True]
    assert keys["clip.vision.image_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", PROJECTOR_TYPES)
def test_types(pico: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "mmproj.gguf"
    write_projector(path, Checkpoint.open(pico), name.lower())
    types = stored_types(path)
    assert types["v.blk.0.attn_qkv.weight"] == name
    assert types["v.blk.0.attn_qkv.bias"] == "F32"
    assert types["v.position_embd.weight"] == "F32"
    assert types["v.patch_embd.weight.1"] == ("F16" if name == "F16" else "F32"), "ggml convolves with no other type"


def test_unknown_type(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Q4_K.*choose from F16"):
        write_projector(tmp_path / "m.gguf", Checkpoint.open(pico), "Q4_K")


@pytest.mark.parametrize(("bits", "quant_type", "words"), [(0x7FC0, "F32", "NaN"), (0x4880, "F16", "overflow F16")])
def test_weights_that_cannot_be_stored(pico: Path, tmp_path: Path, bits: int, quant_type: str, words: str) -> None:
    """NaN anywhere, and 2**18 where the largest float16 is 65504."""
    checkpoint = Checkpoint.open(shutil.copytree(pico, tmp_path / "damaged"))
    stored = checkpoint.tensors["model.visual.merger.linear_fc2.weight"]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(bits.to_bytes(2, "little"))
    with pytest.raises(InputError, match=rf"merger\.linear_fc2\.weight.*{words}"):
        write_projector(tmp_path / "out" / "m.gguf", checkpoint, quant_type)
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_preprocessor(pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "checkpoint")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json: no such file"):
        write_projector(tmp_path / "m.gguf", Checkpoint.open(folder))
    (folder / "processor_config.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="image_processor"):
        write_projector(tmp_path / "m.gguf", Checkpoint.open(folder))
