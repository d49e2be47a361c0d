import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from mode_gguf.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_json
from mode_gguf.errors import InputError
from tests.pico import write_pico_qwen3vlmoe

GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico checkpoint that a test may damage."""
    return shutil.copytree(pico, tmp_path / "checkpoint")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truth(folder: Path, name: str) -> np.ndarray:
    """The tensor as safetensors itself reads it, in float32."""
    file = json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]
    with safe_open(folder / file, framework="pt") as opened:
        array: np.ndarray = opened.get_tensor(name).float().numpy()
    return array


def bits_as_float(bits: np.ndarray) -> np.ndarray:
    assert bits.dtype == np.uint16
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_reads_what_safetensors_reads(pico: Path) -> None:
    checkpoint = Checkpoint.open(pico)
    assert checkpoint.name == pico.name
    assert checkpoint.repository is None
    for name in (GATE_UP, "lm_head.weight", "model.visual.merger.norm.bias"):
        expected = truth(pico, name)
        assert checkpoint.shape(name) == expected.shape
        np.testing.assert_array_equal(bits_as_float(checkpoint.read(name)), expected)


def test_slices(pico: Path) -> None:
    checkpoint = Checkpoint.open(pico)
    expected = truth(pico, GATE_UP)
    index = (2, slice(None), slice(100, 612))
    for found, wanted in (
        (checkpoint.read(GATE_UP, 3), expected[3]),
        (checkpoint.read(GATE_UP, index), expected[index]),
    ):
        np.testing.assert_array_equal(bits_as_float(found), wanted)
        assert found.flags.c_contiguous
        assert found.flags.writeable
        assert found.flags.owndata, "a slice must not keep the file mapped"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", np.float32), ("float16", np.float16)])
def test_single_file_and_other_types(tmp_path: Path, dtype: str, expected: type) -> None:
    checkpoint = Checkpoint.open(write_pico_qwen3vlmoe(tmp_path, dtype=dtype, shards=1))
    assert checkpoint.read("lm_head.weight", 0).dtype == expected


def test_name_of_a_hub_snapshot(pico: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-lab--Nice-7B" / "snapshots" / "0123abcd"
    shutil.copytree(pico, snapshot)
    checkpoint = Checkpoint.open(snapshot)
    assert (checkpoint.name, checkpoint.repository) == ("Nice-7B", "some-lab/Nice-7B")


class TestFingerprint:
    def test_does_not_depend_on_place_or_time(self, pico: Path, folder: Path) -> None:
        (folder / INDEX_FILE).touch()
        assert Checkpoint.open(folder).fingerprint == Checkpoint.open(pico).fingerprint

    def test_tells_weights_apart(self, pico: Path, tmp_path: Path) -> None:
        other = write_pico_qwen3vlmoe(tmp_path, seed=1)
        assert Checkpoint.open(other).fingerprint != Checkpoint.open(pico).fingerprint

    def test_tells_configurations_apart(self, pico: Path, folder: Path) -> None:
        edit_json(folder / "config.json", image_token_id=1)
        assert Checkpoint.open(folder).fingerprint != Checkpoint.open(pico).fingerprint


class TestRefusals:
    def refused(self, folder: Path, *words: str) -> None:
        with pytest.raises(InputError) as caught:
            Checkpoint.open(folder)
        for word in words:
            assert word in str(caught.value)

    def test_missing_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "nowhere", "no such folder")

    def test_gguf_file(self, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF\x03\x00")
        self.refused(file, "a GGUF file found", "checkpoint folder")

    def test_other_file(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"")
        self.refused(file, "a file found")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refused(folder, "config.json", "no such file")

    @pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", "[" * 100_000])
    def test_broken_config(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        self.refused(folder, "config.json", "JSON")

    def test_quantized(self, folder: Path) -> None:
        edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
        self.refused(folder, "already quantized (fp8)")

    def test_pickles_only(self, folder: Path) -> None:
        for file in folder.glob("*safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80")
        self.refused(folder, "pickled", "save_pretrained")

    def test_no_weights(self, folder: Path) -> None:
        for file in folder.glob("*safetensors*"):
            file.unlink()
        self.refused(folder, INDEX_FILE, SINGLE_FILE)

    def test_missing_shard(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        self.refused(folder, "model-00002-of-00002.safetensors", "missing")

    @pytest.mark.parametrize("lost", [1, 100_000])
    def test_truncated_shard(self, folder: Path, lost: int) -> None:
        shard = folder / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-lost])
        self.refused(folder, shard.name, "cut off inside tensor")

    def test_shard_cut_inside_its_header(self, folder: Path) -> None:
        shard = folder / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:50])
        self.refused(folder, shard.name, "cut off inside its header")

    @pytest.mark.parametrize("file", ["/etc/passwd", "../other.safetensors", "C:\\x.safetensors", "a/../../x", "..\\x"])
    def test_index_pointing_outside(self, folder: Path, file: str) -> None:
        edit_json(folder / INDEX_FILE, weight_map={"a": file})
        self.refused(folder, INDEX_FILE, "outside")

    def test_index_naming_an_unknown_tensor(self, folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        edit_json(folder / INDEX_FILE, weight_map=index | {"ghost.weight": "model-00001-of-00002.safetensors"})
        self.refused(folder, "ghost.weight", "model-00001-of-00002.safetensors")

    @pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
    def test_broken_index(self, folder: Path, weight_map: Any) -> None:
        edit_json(folder / INDEX_FILE, weight_map=weight_map)
        self.refused(folder, INDEX_FILE, "weight_map")

    def test_fp8(self, folder: Path) -> None:
        (folder / INDEX_FILE).unlink()
        header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
        (folder / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
        self.refused(folder, "tensor w", "F8_E4M3", "BF16 original")

    def test_integers(self, folder: Path) -> None:
        (folder / INDEX_FILE).unlink()
        save_file({"w": np.zeros(3, np.int64)}, folder / SINGLE_FILE)
        self.refused(folder, "tensor w", "I64", "BF16")


def test_missing_tensor_names_it(pico: Path) -> None:
    with pytest.raises(InputError, match=r"no\.such\.tensor"):
        Checkpoint.open(pico).read("no.such.tensor")


def test_file_shortened_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"lm_head.weight cannot be read"):
        checkpoint.read("lm_head.weight")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checkpoint = Checkpoint.open(tmp_path)
    except InputError:
        return
    for name in checkpoint.tensors:
        assert checkpoint.read(name).shape == checkpoint.shape(name)


@given(st.binary(max_size=64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_json_returns_an_object_or_refuses(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(content)
    with suppress(InputError):
        assert isinstance(read_json(path), dict)
