"""Hidden states in memory and in files."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mode_gguf.errors import MissingResourceError
from mode_gguf.forward.hidden_store import HiddenStore


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary folders are made in."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_comes_back(temporary: Path, dtype: torch.dtype) -> None:
    tensors = {number: torch.randn(number, 3, 4).to(dtype) for number in range(5)}
    with HiddenStore(limit_bytes=200) as store:
        for number, tensor in tensors.items():
            store.put(number, tensor)
        assert store.held_bytes <= 200
        assert store.filed > 0
        for number, tensor in tensors.items():
            assert torch.equal(store.get(number), tensor)
            assert store.get(number).dtype is dtype
        kept = store.take(4)
        with pytest.raises(KeyError):
            store.get(4)
        store.put(3, tensors[4])
        assert torch.equal(store.get(3), tensors[4])
    assert torch.equal(kept, tensors[4])
    assert list(temporary.iterdir()) == []


def test_memory_comes_first_and_is_used_again(temporary: Path) -> None:
    with HiddenStore(limit_bytes=64) as store:
        store.put("a", torch.zeros(16))
        store.put("b", torch.ones(16))
        assert (store.held_bytes, store.filed) == (64, 1)
        (folder,) = temporary.iterdir()
        store.drop("a")
        store.put("b", torch.full((16,), 2.0))
        assert (store.held_bytes, store.filed) == (64, 0)
        assert list(folder.iterdir()) == []
        assert store.get("b").tolist() == [2.0] * 16


def test_a_file_is_a_copy(temporary: Path) -> None:
    with HiddenStore(limit_bytes=0) as store:
        tensor = torch.ones(3, 4)
        store.put("x", tensor[1:].T)
        tensor.zero_()
        assert torch.equal(store.get("x"), torch.ones(4, 2))


def test_files_go_when_an_error_is_raised(temporary: Path) -> None:
    def fail() -> None:
        with HiddenStore(limit_bytes=0) as store:
            store.put("x", torch.ones(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(temporary.iterdir()) == []


def test_folders_of_killed_processes_are_removed(temporary: Path) -> None:
    with HiddenStore(limit_bytes=0) as other:
        other.put("a", torch.ones(3))
        (alive,) = temporary.iterdir()
        abandoned, link = temporary / "mode-gguf-hidden-dead", temporary / "mode-gguf-hidden-link"
        foreign = temporary / "something-else"
        for folder in (abandoned, foreign):
            folder.mkdir()
            (folder / "0").write_bytes(b"hidden states")
        link.symlink_to(foreign)
        with HiddenStore(limit_bytes=0) as store:
            store.put("a", torch.zeros(3))
            assert not abandoned.exists()
        assert {alive, link, foreign} == set(temporary.iterdir())
        assert (foreign / "0").exists()
        assert other.get("a").tolist() == [1, 1, 1]


def test_a_full_disk_is_an_error_not_a_signal(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with HiddenStore(limit_bytes=0) as store, pytest.raises(MissingResourceError, match="TMPDIR"):
        store.put("a", torch.ones(3))
