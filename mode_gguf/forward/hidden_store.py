"""A store of hidden states: in memory up to a limit, beyond it in files that are mapped when they are read."""

import os
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from mode_gguf.errors import MissingResourceError
from mode_gguf.options import ComputeOptions
from mode_gguf.temporary_folders import LockedFolder, remove_abandoned


class HiddenStore:
    """A store of CPU tensors by key. Once those held take `limit_bytes`, further ones go to a temporary folder.

    The folder is removed when the store is closed or, as it is a context manager, left. Tensors that `get` or `take`
    gave stay valid: a mapped file lives on until nobody maps it. A process that is killed leaves its folder, which the
    next run removes when it starts, or the next store that needs one (`temporary_folders`).
    """

    def __init__(self, limit_bytes: int = ComputeOptions.hidden_memory) -> None:
        self._limit = limit_bytes
        self._held: dict[Hashable, Tensor] = {}
        self._held_bytes = 0
        self._filed: dict[Hashable, tuple[Path, torch.Size, torch.dtype]] = {}
        self._files_made = 0
        self._folder: LockedFolder | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes in memory; never more than the limit."""
        return self._held_bytes

    @property
    def filed(self) -> int:
        """Number of tensors in files."""
        return len(self._filed)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._filed

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a copy of `tensor`, in place of what `key` had; one in memory may share it, so do not write to it."""
        self.drop(key)
        if self._held_bytes + tensor.nbytes <= self._limit:
            self._held[key] = tensor.cpu()
            self._held_bytes += tensor.nbytes
            return
        if self._folder is None:
            remove_abandoned()
            self._folder = LockedFolder()
        path = self._folder.path / str(self._files_made)
        self._files_made += 1
        if tensor.numel():
            _reserve(path, tensor.nbytes)
            mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            mapped.copy_(tensor.detach().flatten())
        self._filed[key] = (path, tensor.shape, tensor.dtype)

    def get(self, key: Hashable) -> Tensor:
        """The tensor under `key`, not to be written to; KeyError if there is none."""
        if key in self._held:
            return self._held[key]
        path, shape, dtype = self._filed[key]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(path), shared=False, size=shape.numel(), dtype=dtype).view(shape)

    def take(self, key: Hashable) -> Tensor:
        """The tensor under `key`, removed from the store."""
        tensor = self.get(key)
        self.drop(key)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Remove the tensor under `key`, if there is one."""
        held = self._held.pop(key, None)
        if held is not None:
            self._held_bytes -= held.nbytes
        path, _, _ = self._filed.pop(key, (None, None, None))
        if path is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all tensors and the folder."""
        self._held.clear()
        self._held_bytes = 0
        self._filed.clear()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def __enter__(self) -> "HiddenStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _reserve(path: Path, size: int) -> None:
    """Allocate a file's disk space: writing to a mapped one on a full disk would kill the process instead of raising.

    Raises:
        MissingResourceError: the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise MissingResourceError(
            f"{path.parent}: no room for hidden states ({error}); free some space, or name a folder on a larger disk "
            "in TMPDIR"
        ) from error
