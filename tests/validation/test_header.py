"""Our reading of GGUF heads against gguf-py's, and files that are not what they should be."""

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.errors import InputError
from mode_gguf.validation.header import read_header
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
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path)
    (tmp_path / "old.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(64))
    with pytest.raises(InputError, match="version 1 found"):
        read_header(tmp_path / "old.gguf")
