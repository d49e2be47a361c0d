"""Our reading of GGUF heads against gguf-py's, and files that are not what they should be."""

import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.gguf.header import read_header
from mode_gguf.validation.structure import check_structure, describe
from tests.refusals import refused_at_once
from tests.validation.conftest import Files


def test_equals_gguf_py(small: Files) -> None:
    header, reader = read_header(small.text), GGUFReader(small.text)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert info.type == tensor.tensor_type.name
        assert (info.offset, info.size_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.n_weights == tensor.n_elements
    assert header.metadata.keys() == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in header.metadata.items():
        assert value == reader.fields[key].contents(), key
    assert header.size_bytes == small.text.stat().st_size
    assert header.bpw == pytest.approx(
        8 * sum(t.n_bytes for t in reader.tensors) / sum(t.n_elements for t in reader.tensors)
    )


@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(small: Files, folder: Path, cut: float) -> None:
    data = small.text.read_bytes()
    path = folder / "cut.gguf"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(InputError, match=r"cut\.gguf: (truncated|not a GGUF)"):
        read_header(path)


@given(place=st.integers(4, 3000), byte=st.integers(0, 255))
def test_damaged_anywhere_is_read_or_refused(small: Files, folder: Path, place: int, byte: int) -> None:
    data = bytearray(small.text.read_bytes()[:30_000])
    data[place] = byte
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged\.gguf"):
        read_header(path)  # damaged or not, the tensors' data are cut off


def write_shard(path: Path, number: int, count: int) -> None:
    import numpy as np

    writer = GGUFWriter(path, "test")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_tensor(f"tensor.{number}", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_shards_are_read_together(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"model-{number + 1:05d}-of-00003.gguf", number, 3)
    header = read_header(tmp_path / "model-00001-of-00003.gguf")
    assert sorted(header.tensors) == ["tensor.0", "tensor.1", "tensor.2"]
    assert len(header.files) == 3
    with pytest.raises(InputError, match="give the first one"):
        read_header(tmp_path / "model-00002-of-00003.gguf")
    (tmp_path / "model-00003-of-00003.gguf").unlink()
    with pytest.raises(InputError, match=r"00003-of-00003\.gguf: cannot be read"):
        read_header(tmp_path / "model-00001-of-00003.gguf")


def test_folders_and_other_versions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder found, a GGUF file expected"):
        read_header(tmp_path)
    (tmp_path / "old.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(64))
    with pytest.raises(InputError, match="version 1 found"):
        read_header(tmp_path / "old.gguf")


def test_shards_that_do_not_go_together(tmp_path: Path) -> None:
    """One of another model, or two of the same number."""
    first, second = (tmp_path / f"model-0000{number}-of-00002.gguf" for number in (1, 2))
    write_shard(first, 0, 2)
    for number, count in ((0, 2), (1, 3)):
        write_shard(second, number, count)
        with pytest.raises(InputError, match=r"00002-of-00002\.gguf: does not go with model-00001"):
            read_header(first)


class Head:
    """The bytes of a GGUF head that may say anything."""

    def __init__(self, n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> None:
        self.bytes = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)

    def string(self, text: bytes, length: int | None = None) -> "Head":
        self.bytes += struct.pack("<Q", len(text) if length is None else length) + text
        return self

    def number(self, layout: str, *values: int | float) -> "Head":
        self.bytes += struct.pack("<" + layout, *values)
        return self

    def key(self, name: bytes, kind: int) -> "Head":
        return self.string(name).number("I", kind)

    def tensor(self, name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> "Head":
        return self.string(name).number(f"I{len(shape)}QIQ", len(shape), *shape, kind, offset)


U8, U32, STRING, ARRAY = 0, 4, 8, 9
HUGE = 2**64 - 1

HOSTILE = {
    "tensors": Head(n_tensors=HUGE),
    "keys": Head(n_keys=HUGE),
    "keys of nothing": Head(n_keys=2**40),
    "key's length": Head(n_keys=1).string(b"k", HUGE),
    "value's length": Head(n_keys=1).key(b"k", STRING).string(b"v", 2**62),
    "elements": Head(n_keys=1).key(b"k", ARRAY).number("IQ", U8, HUGE),
    "strings": Head(n_keys=1).key(b"k", ARRAY).number("IQ", STRING, 2**40),
    "nested arrays": Head(n_keys=1).key(b"k", ARRAY).number("IQ" * 100, *[ARRAY, 1] * 100),
    "value type": Head(n_keys=1).key(b"k", 77).number("I", 1),
    "key twice": Head(n_keys=2).key(b"k", U32).number("I", 1).key(b"k", U32).number("I", 2),
    "dimensions": Head(n_tensors=1).string(b"t").number("I", 2**31).number("Q", 1),
    "no dimensions": Head(n_tensors=1).tensor(b"t", ()),
    "empty": Head(n_tensors=1).tensor(b"t", (0, 4)),
    "shape": Head(n_tensors=1).tensor(b"t", (2**62, 2**62, 2**62)),
    "offset": Head(n_tensors=1).tensor(b"t", (4,), offset=HUGE - 31),
    "odd offset": Head(n_tensors=1).tensor(b"t", (4,), offset=3),
    "tensor type": Head(n_tensors=1).tensor(b"t", (4,), kind=9999),
    "tensor twice": Head(n_tensors=2).tensor(b"t", (1,)).tensor(b"t", (1,)),
    "alignment 0": Head(n_keys=1).key(b"general.alignment", U32).number("I", 0),
    "alignment 2^31": Head(n_keys=1).key(b"general.alignment", U32).number("I", 2**31),
    "alignment 48": Head(n_keys=1).key(b"general.alignment", U32).number("I", 48),
    "alignment text": Head(n_keys=1).key(b"general.alignment", STRING).string(b"32"),
    "shards": Head(n_keys=1).key(b"split.count", U32).number("I", 2**32 - 1),
    "shards text": Head(n_keys=1).key(b"split.count", STRING).string(b"2"),
    "version": Head(version=9),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [read_header, read_imatrix], ids=["header", "imatrix"])
def test_hostile_heads_are_refused_at_once(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name].bytes + bytes(64))
    refused_at_once(partial(read, path), r"hostile\.gguf")


@pytest.mark.parametrize("element", [U8, STRING])
def test_a_large_file_of_little_things_is_refused(tmp_path: Path, element: int) -> None:
    """Sparse: it claims what it has, and would take gigabytes of objects."""
    path = tmp_path / "hostile.gguf"
    head = Head(n_keys=1).key(b"k", ARRAY).number("IQ", element, 2**33)
    for claim in (head, Head(2**36, 0), Head(0, 2**36)):
        path.write_bytes(claim.bytes)
        os.truncate(path, 2**37)
        refused_at_once(partial(read_header, path), r"hostile\.gguf")


@given(data=st.data())
def test_any_head_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    """Heads whose form is right and whose numbers are anything."""
    number = st.one_of(st.integers(0, 70), st.integers(0, HUGE), st.sampled_from([2**k for k in range(64)]))
    text = st.binary(max_size=12)
    n_keys, n_tensors = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    head = Head(n_tensors, n_keys)
    for _ in range(n_keys):
        known = st.sampled_from([b"general.alignment", b"split.count", b"split.no", b"imatrix.datasets"])
        kind = data.draw(st.sampled_from([U8, U32, STRING, ARRAY, 10, 6, 7]))
        head.key(data.draw(st.one_of(known, text)), kind)
        if kind == STRING:
            head.string(data.draw(text), data.draw(st.one_of(st.none(), number)))
        elif kind == ARRAY:
            head.number("IQ", data.draw(st.sampled_from([U8, U32, STRING, ARRAY])), data.draw(number))
            head.bytes += data.draw(st.binary(max_size=40))
        else:
            head.bytes += data.draw(st.binary(min_size=1, max_size=8))
    for _ in range(n_tensors):
        shape = data.draw(st.lists(number, min_size=1, max_size=4))
        head.tensor(data.draw(text), tuple(shape), data.draw(st.integers(0, 50)), data.draw(number))
    path = folder / "any.gguf"
    path.write_bytes(head.bytes + bytes(data.draw(st.integers(0, 300))))
    for read in (read_header, describe, check_structure, read_imatrix):
        try:
            read(path)
        except (InputError, ValidationError) as error:
            assert "any.gguf" in str(error)  # noqa: PT017
