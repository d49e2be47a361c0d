"""Fallback types: types of 32 weights for tensors whose rows are no multiple of 256, which no K-quant fits.

Everywhere else types keep the name that was asked for: a candidate, a column of a table of costs, the type of an
expert. `stored_as` gives the type that a tensor's rows then really take.
"""

from collections.abc import Iterable, Sequence

from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.quantization.libggml import is_storable
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

FALLBACK_TYPES = tuple(QUANT_TYPES[name] for name in ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0"))
"""Types of 32 weights, smallest first, each the best of its size or better than a mixture of its neighbours
(docs/experiments/candidate-types.md). There is none below 4.5 bits that llama.cpp runs everywhere."""


def stored_as(tensor: SourceTensor, quant_type: QuantType) -> QuantType | None:
    """The type of the tensor's rows where `quant_type` is asked for: it, or the fallback type nearest to it in bits.

    None where they can be stored in neither: rows that are no multiple of 32, and types that need an importance which
    calibration does not give.

    Raises:
        MissingResourceError: the type is libggml's, which cannot be used.
    """
    if quant_type.fits(tensor.row_width):
        return quant_type if is_storable(tensor, quant_type) else None
    fitting = [fallback for fallback in FALLBACK_TYPES if fallback.fits(tensor.row_width)]
    return nearest_in_bits(quant_type, fitting) if fitting else None


def nearest_in_bits(quant_type: QuantType, offered: Iterable[QuantType]) -> QuantType:
    """The offered type of most nearly as many bits; of two, the first."""
    return min(offered, key=lambda one: abs(one.bits_per_weight - quant_type.bits_per_weight))


def fallback_types_of(tensors: Iterable[SourceTensor], types: Sequence[QuantType]) -> dict[str, tuple[str, ...]]:
    """Types of the tensors that some of `types` do not fit, by tensor name: the types they take, in order."""
    result = {}
    for tensor in tensors:
        stored = [stored_as(tensor, quant_type) for quant_type in types]
        if any(one is not None and one != asked for one, asked in zip(stored, types, strict=True)):
            result[tensor.name] = tuple((one or asked).name for one, asked in zip(stored, types, strict=True))
    return result
