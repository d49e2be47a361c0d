"""What the integer programme chooses between: units, each with its candidate types, their sizes and their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.quantization.libggml import is_storable
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

Granularity: TypeAlias = Literal["tensor", "expert"]
"""What shares a type: all experts of a layer's projection, as stock llama.cpp loads it, or an expert's projections."""

FALLBACK = QUANT_TYPES["Q8_0"]
"""Takes over where no candidate can store a tensor: 32 weights is the smallest block there is."""

UNMEASURED = QUANT_TYPES["Q6_K"]
"""Of dense matrices that calibration says nothing about: nearly what full precision is, and there are few."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One type a unit may take, the bytes it then occupies, and what that costs (nats for Fisher sensitivity)."""

    quant_type: QuantType
    size_bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class AllocationUnit:
    """Weights that must share a type: one tensor, or one expert's projections (`expert` is then its number).

    `is_expert`: whether they are routed experts' weights, of one or of all.
    """

    name: str
    tensors: tuple[str, ...]
    n_weights: int
    candidates: tuple[Candidate, ...]
    layer: int | None = None
    expert: int | None = None
    is_expert: bool = False


def tensor_bytes(tensor: SourceTensor, quant_type: QuantType) -> int:
    """Bytes of the whole tensor stored in `quant_type`, whose block its rows must be a multiple of."""
    return tensor.n_weights // tensor.row_width * quant_type.row_bytes(tensor.row_width)


def fitting_types(tensor: SourceTensor, candidates: Sequence[QuantType]) -> tuple[QuantType, ...]:
    """The candidates that the tensor can be stored in, smallest first; Q8_0 alone when there is none.

    Raises:
        InfeasibleBudgetError: not even 32-weight blocks divide the rows.
    """
    fitting = [candidate for candidate in candidates if is_storable(tensor, candidate)]
    if not fitting and FALLBACK.fits(tensor.row_width):
        fitting = [FALLBACK]
    if not fitting:
        raise InfeasibleBudgetError(
            f"{tensor.name}: rows of {tensor.row_width} weights are not a multiple of any candidate's block "
            f"({', '.join(f'{c.name} {c.block_size}' for c in candidates)}); add F16 to the candidates"
        )
    return tuple(sorted(fitting, key=lambda quant_type: quant_type.bits_per_weight))


@dataclass(frozen=True, slots=True)
class CandidateTypes:
    """Types offered to the routed experts, and to attention, embedding and output ("dense").

    `floors`: per role the type below whose bits per weight nothing is offered; where no candidate is as large, it is
    offered itself.
    """

    expert: tuple[QuantType, ...]
    dense: tuple[QuantType, ...]
    floors: Mapping[Role, QuantType] = field(default_factory=dict)

    def of(self, tensor: SourceTensor) -> tuple[QuantType, ...]:
        """What `tensor` may be stored as: F32 alone for routers, norms and biases, `UNMEASURED` for what it is."""
        if tensor.role is Role.KEEP:
            return (QUANT_TYPES["F32"],)
        if tensor.role in (Role.DENSE, Role.OUTPUT) and tensor.activation is None:
            return fitting_types(tensor, (UNMEASURED,))
        offered = self.expert if tensor.role is Role.EXPERT else self.dense
        if floor := self.floors.get(tensor.role):
            least = floor.bits_per_weight
            offered = tuple(candidate for candidate in offered if candidate.bits_per_weight >= least) or (floor,)
        return fitting_types(tensor, offered)


DEFAULT_TYPES = CandidateTypes(
    expert=tuple(QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
    dense=tuple(QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")),
)
