import json
import os
import random
import shutil
import tempfile
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from mode_gguf.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint, read_json
from mode_gguf.errors import InputError
from mode_gguf.export.projector import write_projector
from tests.export.uniform import write_all_in
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe
from tests.refusals import refused_at_once

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

    @pytest.mark.parametrize(
        ("content", "words"), [(b"GGUF\x03\x00", ("a GGUF file found", "checkpoint folder")), (b"", ("a file found",))]
    )
    def test_a_file(self, tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
        (tmp_path / "model").write_bytes(content)
        self.refused(tmp_path / "model", *words)

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("config.json", ("config.json", "no such file")),
            ("*safetensors*", (INDEX_FILE, SINGLE_FILE)),
            ("model-00002-of-00002.safetensors", ("model-00002-of-00002.safetensors", "missing")),
        ],
    )
    def test_missing_files(self, folder: Path, pattern: str, words: tuple[str, ...]) -> None:
        for file in folder.glob(pattern):
            file.unlink()
        self.refused(folder, *words)

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

    @pytest.mark.parametrize(("kept", "part"), [(-1, "tensor"), (-100_000, "tensor"), (50, "its header")])
    def test_truncated_shard(self, folder: Path, kept: int, part: str) -> None:
        shard = folder / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:kept])
        self.refused(folder, shard.name, f"cut off inside {part}")

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

    def test_fp8(self, tmp_path: Path) -> None:
        header = json.dumps({"w": entry((1,), (0, 1), "F8_E4M3")}).encode()
        self.refused(single_file(tmp_path, header), "tensor w", "F8_E4M3", "BF16 original")

    @pytest.mark.parametrize("kept", ["config.json", SINGLE_FILE])
    def test_layout_of_mistral(self, tmp_path: Path, kept: str) -> None:
        for name in ("consolidated-00001-of-00002.safetensors", "params.json", kept):
            (tmp_path / name).write_text("{}")
        self.refused(tmp_path, "Mistral's own layout", "same repository")

    def test_integers(self, folder: Path) -> None:
        for file in folder.glob("*safetensors*"):
            file.unlink()
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


HUGE = 2**64 - 1


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, Any] = {
    "no object": [],
    "number": 7,
    "entry no object": {"a": 1},
    "entry a list": {"a": [1, 2]},
    "nothing in it": {"a": {}},
    "offset past the end": {"a": entry((2,), (2**40, 2**40 + 8))},
    "offsets beyond 64 bits": {"a": entry((2,), (2**80, 2**80 + 8))},
    "negative offsets": {"a": entry((2,), (-8, 0))},
    "backwards": {"a": entry((2,), (8, 0))},
    "one offset": {"a": entry((2,), (8,))},
    "overlap": {"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))},
    "same bytes twice": {"a": entry(), "b": entry()},
    "product beyond 64 bits": {"a": entry((2**32, 2**32), (0, 0))},
    "product of 0 bits": {"a": entry((2**63, 2**63, 0), (0, 0))},
    "dimensions": {"a": entry((1,) * 1000, (0, 4))},
    "negative shape": {"a": entry((-1, -2))},
    "shape in words": {"a": entry("2")},
    "shape of text": {"a": entry(("2",))},
    "shape of fractions": {"a": entry((2.5,))},
    "shape of truth": {"a": entry((True, 2))},
    "shape of nothing": {"a": entry(None)},
    "offsets of fractions": {"a": entry((2,), (0.0, 8.0))},
    "infinite": {"a": entry((float("inf"),))},
    "NaN": {"a": entry((2,), (float("nan"), 8))},
    "type": {"a": entry(dtype=4)},
    "type unknown": {"a": entry(dtype="F" * 10_000)},
}


def single_file(folder: Path, header: bytes, claimed: int | None = None, data: int = 64) -> Path:
    """A checkpoint whose only file has this header, of `claimed` bytes, and some data."""
    (folder / "config.json").write_text("{}")
    length = len(header) if claimed is None else claimed
    (folder / SINGLE_FILE).write_bytes(length.to_bytes(8, "little") + header + bytes(data))
    return folder


def opening_is_refused(folder: Path, words: str = "") -> None:
    """At once, naming the file."""
    refused_at_once(partial(Checkpoint.open, folder), f"{SINGLE_FILE}.*{words}")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_at_once(tmp_path: Path, name: str) -> None:
    opening_is_refused(single_file(tmp_path, json.dumps(HOSTILE[name]).encode()))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}',
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": ' * 50_000,
        b"[" * 200_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 8]}}',
        b'{"' + b"a" * 100_000 + b'": 1}',
        b"\xff\xfe",
        b"",
    ],
    ids=["key twice", "field twice", "deep objects", "deep lists", "digits", "long name", "no text", "nothing"],
)
def test_hostile_json_is_refused_at_once(tmp_path: Path, header: bytes) -> None:
    opening_is_refused(single_file(tmp_path, header))


@pytest.mark.parametrize("claimed", [2**30, 2**63, HUGE])
def test_a_header_longer_than_the_file(tmp_path: Path, claimed: int) -> None:
    opening_is_refused(single_file(tmp_path, b"{}", claimed), "cut off inside its header")


def test_a_header_of_a_gigabyte(tmp_path: Path) -> None:
    folder = single_file(tmp_path, b"{}", 2**30)
    os.truncate(folder / SINGLE_FILE, 2**30 + 8)
    opening_is_refused(folder, r"a header of 1,073,741,824 bytes found, 33,554,432 at most")


def test_an_index_of_gigabytes(folder: Path) -> None:
    os.truncate(folder / INDEX_FILE, 2**32)
    with pytest.raises(InputError, match=r"4,294,967,296 bytes of JSON found"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["a" * 5000, "a\0b", "", "."])
def test_an_index_with_names_of_no_file(folder: Path, file: str) -> None:
    edit_json(folder / INDEX_FILE, weight_map={"a": file})
    with pytest.raises(InputError, match="missing"):
        Checkpoint.open(folder)


def test_links_are_followed(pico: Path, tmp_path: Path) -> None:
    """The hub's cache holds nothing else; an index, which comes from the network, makes none."""
    for file in pico.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert Checkpoint.open(tmp_path).fingerprint == Checkpoint.open(pico).fingerprint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-HUGE, HUGE) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
sizes = st.integers(-4, 40) | st.integers(-HUGE, HUGE)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16"]) | json_values,
                "shape": st.lists(sizes, max_size=4) | json_values,
                "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
            }
        )
        | json_values,
        max_size=4,
    )
)
def test_any_header_is_refused_or_can_be_read(tmp_path: Path, header: dict[str, Any]) -> None:
    try:
        checkpoint = Checkpoint.open(single_file(tmp_path, json.dumps(header).encode()))
    except InputError as error:
        assert SINGLE_FILE in str(error)  # noqa: PT017
        return
    for name in checkpoint.tensors:
        with suppress(InputError):  # of no bytes
            assert checkpoint.read(name).shape == checkpoint.shape(name)
    spans = sorted((t.offset, t.offset + t.nbytes) for t in checkpoint.tensors.values())
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_tensors_anywhere_in_shards_of_any_order_give_the_same_file(pico: Path, tmp_path: Path, seed: int) -> None:
    """Spread at random over shards with odd names, listed in an index in another order."""
    draw = random.Random(seed)
    original, folder = Checkpoint.open(pico), Path(tempfile.mkdtemp(dir=tmp_path)) / pico.name
    shutil.copytree(pico, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    names = list(original.tensors)
    draw.shuffle(names)
    shards = [f"{draw.choice('zaMk')}-{number}.safetensors" for number in range(5)]
    weight_map = {name: draw.choice(shards) for name in names}
    for shard in set(weight_map.values()):
        inside = [name for name, file in weight_map.items() if file == shard]
        draw.shuffle(inside)
        write_bf16(folder / shard, {name: original.read(name) for name in inside})
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    written = []
    for checkpoint in (original, Checkpoint.open(folder)):
        write_all_in(tmp_path / "text.gguf", checkpoint, "Q8_0")
        write_projector(tmp_path / "mmproj.gguf", checkpoint, "F16")
        written.append([(tmp_path / file).read_bytes() for file in ("text.gguf", "mmproj.gguf")])
    assert written[0] == written[1]


def write_bf16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of uint16 arrays that hold bfloat16, in this order; the package's writer sorts them."""
    header, place = {}, 0
    for name, array in tensors.items():
        assert array.dtype == np.uint16
        header[name] = entry(array.shape, (place, place + array.nbytes), "BF16")
        place += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))
