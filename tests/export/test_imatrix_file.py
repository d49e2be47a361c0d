from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mode_gguf.errors import InputError
from mode_gguf.export.imatrix_file import read_imatrix, read_imatrix_header, write_imatrix

NAME = "blk.0.ffn_down_exps.weight"


def write(path: Path, sums: Any, counts: Any) -> None:
    write_imatrix(path, {NAME: (np.array(sums), np.array(counts))}, ["corpus"], chunk_count=3, chunk_size=512)


def test_layout_is_that_of_llama_imatrix(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write(path, np.ones((2, 8)), [3, 0])
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in reader.fields
    assert reader.fields["imatrix.datasets"].contents() == ["corpus"]
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes == {f"{NAME}.in_sum2": ("F32", [8, 2]), f"{NAME}.counts": ("F32", [1, 2])}
    header = read_imatrix_header(path)
    assert (header.datasets, header.chunk_count, header.chunk_size, header.n_entries) == (("corpus",), 3, 512, 1)


def test_importance_is_the_mean_and_one_without_tokens(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write(path, [[1.0, 2.0, 5.0], [7.0, 7.0, 7.0]], [3, 0])
    importance = read_imatrix(path)[NAME]
    assert importance.dtype == np.float32
    one_third = np.float32(1) / np.float32(3)
    np.testing.assert_array_equal(
        importance, np.array([[one_third, np.float32(2) / np.float32(3), np.float32(5) / np.float32(3)], [1, 1, 1]])
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sums=st.lists(st.floats(0, 2.0**60, width=32), min_size=4, max_size=4),
    counts=st.lists(st.integers(0, 2**24), min_size=2, max_size=2),
)
@example(sums=[0.0, 1.0, 0.0, 0.0], counts=[13344313, 0])  # odd, and too large for a half in float32
def test_round_trip(tmp_path: Path, sums: list[float], counts: list[int]) -> None:
    path = tmp_path / "imatrix.gguf"
    in_sum2 = np.array(sums, np.float32).reshape(2, 2)
    write(path, in_sum2, counts)
    found = read_imatrix(path)[NAME]
    for row, count, expected in zip(found, counts, in_sum2, strict=True):
        np.testing.assert_array_equal(row, expected / np.float32(count) if count else np.ones(2))


@pytest.mark.parametrize(
    ("sums", "counts", "words"),
    [
        ([[1.0, 2.0]], [0.5], "whole"),
        ([[1.0, np.nan]], [1], "not finite"),
        ([[1.0, -1.0]], [1], "negative"),
        ([[1.0, 2.0]], [1, 2], "one count per row"),
        ([[1.0, 2.0]], [np.inf], "not finite"),
    ],
)
def test_what_llama_quantize_would_misread_is_not_written(tmp_path: Path, sums: Any, counts: Any, words: str) -> None:
    path = tmp_path / "imatrix.gguf"
    with pytest.raises(InputError, match=words):
        write(path, sums, counts)
    assert not path.exists()


def stock_like(path: Path, *missing: str, **tensors: Any) -> Path:
    """An imatrix file written without our writer, less some keys."""
    writer = GGUFWriter(path, "")
    values = {"imatrix.datasets": ["x"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 512}
    for key in values.keys() - set(missing):
        value = values[key]
        writer.add_array(key, value) if isinstance(value, list) else writer.add_uint32(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestRefusals:
    @pytest.mark.parametrize("key", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
    def test_missing_key(self, tmp_path: Path, key: str) -> None:
        path = stock_like(tmp_path / "i.gguf", key, a__in_sum2=np.ones((1, 4), np.float32))
        with pytest.raises(InputError, match=key.replace(".", r"\.")):
            read_imatrix(path)

    def test_sums_without_counts(self, tmp_path: Path) -> None:
        path = stock_like(tmp_path / "i.gguf", a__in_sum2=np.ones((1, 4), np.float32))
        with pytest.raises(InputError, match=r"a\.in_sum2 has no a\.counts"):
            read_imatrix(path)

    def test_another_type(self, tmp_path: Path) -> None:
        halves, count = np.ones((1, 4), np.float16), np.ones((1, 1), np.float32)
        path = stock_like(tmp_path / "i.gguf", a__in_sum2=halves, a__counts=count)
        with pytest.raises(InputError, match=r"a\.in_sum2 has type F16"):
            read_imatrix(path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            read_imatrix(tmp_path / "nothing.gguf")

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 64, b"legacy imatrix.dat"])
    def test_not_gguf(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "i.gguf"
        path.write_bytes(content)
        with pytest.raises(InputError, match="GGUF"):
            read_imatrix(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 600), position=st.integers(0, 600), byte=st.integers(0, 255))
def test_damage_is_refused_or_harmless(tmp_path: Path, cut: int, position: int, byte: int) -> None:
    path = tmp_path / "imatrix.gguf"
    write(path, [[1.0, 2.0, 5.0], [7.0, 7.0, 7.0]], [3, 0])
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content[: max(len(content) - cut, 0)])
    try:
        read_imatrix(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
