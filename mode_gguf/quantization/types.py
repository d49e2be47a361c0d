"""The one table of GGUF tensor types: weights and bytes of a block, and the code that packs it.

Sizes are spelled as ggml's structs read (`ggml-common.h`), so that the arithmetic can be checked by eye.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gguf import GGMLQuantizationType

from mode_gguf.errors import UsageError


class Packer(StrEnum):
    """The code that turns weights into a type's bytes and back."""

    NUMPY = "NumPy"
    KERNELS = "our kernels"
    LIBGGML = "libggml"
    """ggml's own code, out of a llama.cpp that is installed; see `libggml`."""


@dataclass(frozen=True, slots=True)
class QuantType:
    """One GGUF tensor type.

    `block_size` weights are stored together in `type_size` bytes; rows must be a multiple of `block_size`.
    """

    name: str
    block_size: int
    type_size: int
    packer: Packer

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.name]

    def fits(self, row_width: int) -> bool:
        """Whether a row of `row_width` weights can be stored in this type."""
        return row_width % self.block_size == 0

    def row_bytes(self, row_width: int) -> int:
        """Bytes of one row of `row_width` weights; the width must fit."""
        return row_width // self.block_size * self.type_size


QUANT_TYPES: dict[str, QuantType] = {
    quant_type.name: quant_type
    for quant_type in (
        QuantType("F32", 1, 4, Packer.NUMPY),
        QuantType("F16", 1, 2, Packer.NUMPY),
        QuantType("BF16", 1, 2, Packer.NUMPY),
        QuantType("Q8_0", 32, 2 + 32, Packer.KERNELS),
        QuantType("Q2_K", 256, 2 + 2 + 256 // 16 + 256 // 4, Packer.KERNELS),
        QuantType("Q3_K", 256, 2 + 256 // 4 + 256 // 8 + 12, Packer.KERNELS),
        QuantType("Q4_K", 256, 2 + 2 + 12 + 256 // 2, Packer.KERNELS),
        QuantType("Q5_K", 256, 2 + 2 + 12 + 256 // 2 + 256 // 8, Packer.KERNELS),
        QuantType("Q6_K", 256, 2 + 256 // 16 + 3 * 256 // 4, Packer.KERNELS),
        QuantType("IQ2_XXS", 256, 2 + 2 * (256 // 8), Packer.LIBGGML),
        QuantType("IQ2_XS", 256, 2 + 2 * (256 // 8) + 256 // 32, Packer.LIBGGML),
        QuantType("IQ2_S", 256, 2 + 256 // 4 + 256 // 32 + 256 // 32, Packer.LIBGGML),
        QuantType("IQ3_XXS", 256, 2 + 3 * 256 // 8, Packer.LIBGGML),
        QuantType("IQ3_S", 256, 2 + 256 // 4 + 256 // 32 + 256 // 8 + 256 // 64, Packer.LIBGGML),
        QuantType("IQ4_XS", 256, 2 + 2 + 256 // 64 + 256 // 2, Packer.LIBGGML),
        QuantType("IQ4_NL", 32, 2 + 32 // 2, Packer.KERNELS),
        QuantType("Q4_0", 32, 2 + 32 // 2, Packer.KERNELS),
        QuantType("Q4_1", 32, 2 + 2 + 32 // 2, Packer.KERNELS),
        QuantType("Q5_0", 32, 2 + 4 + 32 // 2, Packer.KERNELS),
        QuantType("Q5_1", 32, 2 + 2 + 4 + 32 // 2, Packer.KERNELS),
    )
}


INDEX = QuantType("I32", 1, 4, Packer.NUMPY)
"""The type of expert maps; not in the table, because no weight is stored in it."""


def quant_type(name: str) -> QuantType:
    """The type called `name`, in any letter case.

    Raises:
        UsageError: no such type is known here; the message lists those that are.
    """
    try:
        return QUANT_TYPES[name.upper()]
    except KeyError:
        raise UsageError(f"unknown type {name!r}: choose from {', '.join(QUANT_TYPES)}") from None


def types_packed_by(packer: Packer) -> dict[str, QuantType]:
    """The part of `QUANT_TYPES` that `packer` packs."""
    return {name: quant_type for name, quant_type in QUANT_TYPES.items() if quant_type.packer is packer}


def parse_types(names: str) -> tuple[QuantType, ...]:
    """The types of a comma-separated list, without repetitions, in the order given.

    Raises:
        UsageError: the list is empty or a name is unknown.
    """
    parsed = tuple(dict.fromkeys(quant_type(name.strip()) for name in names.split(",") if name.strip()))
    if not parsed:
        raise UsageError(f"no type in {names!r}: expected a comma-separated list such as Q2_K,Q3_K")
    return parsed


class SizedTensor(Protocol):
    """A tensor of a plan or a file."""

    @property
    def n_weights(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


def bits_per_weight(tensors: Iterable[SizedTensor]) -> float:
    """Bits of the tensors per weight."""
    listed = list(tensors)
    return 8 * sum(tensor.size_bytes for tensor in listed) / sum(tensor.n_weights for tensor in listed)


def type_of_most_weights(weights: Iterable[tuple[QuantType, int]]) -> QuantType:
    """The type that holds the most weights, from pairs of type and number; of equals, the one met first."""
    counted: Counter[QuantType] = Counter()
    for stored_as, n_weights in weights:
        counted[stored_as] += n_weights
    return counted.most_common(1)[0][0]
