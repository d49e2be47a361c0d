"""Artefacts appear whole or not at all, and refuse to be mistaken for something else."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mode_gguf.artifacts import (
    read_arrays,
    read_metadata,
    replaced_atomically,
    write_arrays,
    write_text,
)
from mode_gguf.errors import InputError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "artefact"
    write_text(path, "old")

    def interrupted_write() -> None:
        with replaced_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        interrupted_write()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["artefact"]


def test_arrays_and_metadata_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    arrays = {"x": np.arange(6, dtype=np.float64).reshape(2, 3), "n": np.array([1, 2], dtype=np.int64).T}
    write_arrays(path, arrays, {"model": "pico", "samples": 3})
    loaded, metadata = read_arrays(path)
    assert metadata["model"] == "pico"
    assert metadata["samples"] == 3
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype


def test_foreign_broken_and_missing_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": np.zeros(2)}, foreign)
    with pytest.raises(InputError, match="schema version None found"):
        read_arrays(foreign)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(foreign.read_bytes()[:-4])
    with pytest.raises(InputError, match="cannot be read"):
        read_arrays(broken)
    with pytest.raises(InputError, match="cannot be read"):
        read_arrays(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("said", ["{", "[]", "[" * 100_000, '{"schema_version": ' + "9" * 10_000 + "}"])
def test_metadata_that_is_none(tmp_path: Path, said: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, path, {"mode_gguf": said})
    with pytest.raises(InputError, match=r"x\.safetensors: its metadata mode_gguf is not valid JSON"):
        read_metadata(path)
