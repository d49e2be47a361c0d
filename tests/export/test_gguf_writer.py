import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from mode_gguf.architectures import Metadata
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.export.gguf_writer import OutgoingTensor, add_metadata, write_gguf
from mode_gguf.progress import Advance
from mode_gguf.quantization.types import QUANT_TYPES

ARRAY = np.arange(6, dtype=np.float32).reshape(3, 2)


def outgoing(name: str, *chunks: np.ndarray, shape: tuple[int, ...] = (3, 2)) -> OutgoingTensor:
    return OutgoingTensor(name, shape, QUANT_TYPES["F32"], lambda: iter(chunks), len(chunks))


def nothing(writer: GGUFWriter) -> None:
    """No further keys."""


class Recorder:
    """A progress display that remembers."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> Iterator[Advance]:
        self.total = total

        def advance(n: int) -> None:
            self.done += n

        yield advance


def test_tensors_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    recorder = Recorder()
    tensors = [outgoing("a", ARRAY), outgoing("b", ARRAY[:1], ARRAY[1:])]
    write_gguf(path, "test", nothing, tensors, description="writing", progress=recorder)
    found = GGUFReader(path).tensors
    assert [tensor.name for tensor in found] == ["a", "b"]
    for tensor in found:
        np.testing.assert_array_equal(tensor.data, ARRAY)
    assert (recorder.total, recorder.done) == (3, 3)


def test_metadata_types(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata: Metadata = {"b": True, "i": 7, "f": 0.5, "s": "text", "li": [1, 2], "lb": [True, False], "ls": ["x"]}
    write_gguf(path, "test", lambda writer: add_metadata(writer, metadata), [outgoing("a", ARRAY)], description="")
    fields = GGUFReader(path).fields
    assert {key: fields[key].contents() for key in metadata} == metadata
    assert [fields[key].types[0].name for key in ("b", "i", "f", "s", "li")] == [
        "BOOL", "UINT32", "FLOAT32", "STRING", "ARRAY"
    ]  # fmt: skip


class TestFailures:
    """Whatever happens, no file appears under the final name and none is left beside it."""

    @pytest.mark.parametrize("error", [InputError("bad weight"), KeyboardInterrupt()])
    def test_while_packing(self, tmp_path: Path, error: BaseException) -> None:
        def chunks() -> Iterator[np.ndarray]:
            yield ARRAY[:1]
            raise error

        tensor = OutgoingTensor("a", (3, 2), QUANT_TYPES["F32"], chunks)
        with pytest.raises(type(error)):
            write_gguf(tmp_path / "m.gguf", "test", nothing, [tensor], description="")
        assert list(tmp_path.iterdir()) == []

    def test_an_older_file_survives(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_text("older")
        with pytest.raises(AssertionError, match="a: 8 bytes packed, 24 announced"):
            write_gguf(path, "test", nothing, [outgoing("a", ARRAY[:1])], description="")
        assert path.read_text() == "older"
        assert list(tmp_path.iterdir()) == [path]

    def test_too_little_disk_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        with pytest.raises(MissingResourceError, match=r"B needed on disk, 1\.0 MB free"):
            write_gguf(tmp_path / "new" / "m.gguf", "test", nothing, [outgoing("a", ARRAY)], description="")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written"):
            write_gguf(tmp_path / "file" / "m.gguf", "test", nothing, [outgoing("a", ARRAY)], description="")
