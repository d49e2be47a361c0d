"""Store of tensors rounded with feedback: one file per layer until the GGUF is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mode_gguf import __version__
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.artifacts import read_metadata, write_arrays
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.quantization.packer import has_feedback
from mode_gguf.quantization.types import QuantType

OUTSIDE_LAYERS = "outside"
"""Name of the part of tensors outside the decoder layers."""


@dataclass(frozen=True, slots=True)
class RoundedTensors:
    """A folder with one file per decoder layer, and one for the output head.

    Attributes:
        path: of the folder.
        key: fingerprint of all that the bytes depend on; files with another key count as not there.
    """

    path: Path
    key: str

    def write(self, part: str, packed: Mapping[str, np.ndarray], nearest: Mapping[str, int]) -> None:
        """Write a part's tensors, uint8 (E, rows, row_bytes), atomically.

        Args:
            part: see `part_of`.
            nearest: by tensor, how many of its matrices were rounded to nearest for want of tokens.
        """
        metadata = {"kind": "rounded", "tool_version": __version__, "key": self.key, "nearest": dict(nearest)}
        write_arrays(self._file(part), packed, metadata)

    def has(self, part: str) -> bool:
        """Whether a part exists and has this key."""
        file = self._file(part)
        if not file.exists():
            return False
        try:
            return bool(read_metadata(file).get("key") == self.key)
        except InputError:
            return False

    def check(self, part: str) -> None:
        """Check that a part exists and has this key.

        Raises:
            MissingResourceError: it is not.
        """
        if not self.has(part):
            raise MissingResourceError(
                f"{self._file(part)}: not there, or of another plan; run `mode-gguf export`, which makes it"
            )

    def nearest(self, part: str) -> dict[str, int]:
        """Number of matrices of each tensor of a part that were rounded to nearest for want of tokens."""
        found: dict[str, int] = read_metadata(self._file(part))["nearest"]
        return found

    def matrices(self, part: str, tensor: str) -> Iterator[np.ndarray]:
        """A tensor's matrices one by one, uint8 (rows, row_bytes).

        Raises:
            MissingResourceError: they are not there, or were made from something else.
        """
        self.check(part)
        with safe_open(self._file(part), framework="numpy") as file:
            stored = file.get_slice(tensor)
            for index in range(stored.get_shape()[0]):
                yield stored[index]

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"


def layer_part(layer: int) -> str:
    """Name of a decoder layer's part."""
    return f"blk.{layer}"


def part_of(tensor: SourceTensor) -> str:
    """Name of the part that holds a tensor."""
    return OUTSIDE_LAYERS if tensor.layer is None else layer_part(tensor.layer)


def is_rounded(tensor: SourceTensor, types: Mapping[str, QuantType]) -> bool:
    """Whether a tensor is rounded with feedback: a linear layer's matrix whose inputs are recorded, in a K-quant."""
    linear_layer = tensor.role in (Role.EXPERT, Role.DENSE, Role.OUTPUT) and tensor.activation is not None
    return linear_layer and tensor.name in types and has_feedback(types[tensor.name])
