"""Units of the integer programme, each with its candidate types, their sizes and their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError, UsageError
from mode_gguf.options import DEFAULT_DENSE_TYPES, DEFAULT_EXPERT_TYPES
from mode_gguf.quantization.fallback_types import FALLBACK_TYPES, nearest_in_bits, stored_as
from mode_gguf.quantization.libggml import check_available
from mode_gguf.quantization.types import QUANT_TYPES, QuantType, parse_types, quant_type

ABSORBED_TYPES = (QUANT_TYPES["Q8_0"], QUANT_TYPES["BF16"])
"""Matrices of latent attention that cannot be measured take the first whose blocks fit. llama.cpp's own quantizer gives
them the type of everything else, which they are too small to be worth the risk of: well below 1 % of the weights."""

TYPE_WITHOUT_IMPORTANCE = QUANT_TYPES["Q8_0"]
"""The type of a tensor without importance where all candidates need one."""

TYPE_OF_ANY_ROWS = QUANT_TYPES["F16"]
"""The type of rows that are no multiple of 32 where types are not chosen from candidates, as of llama-quantize."""

UNMEASURED = QUANT_TYPES["Q6_K"]
"""The type of dense matrices without statistics: nearly as good as full precision, and there are few."""


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
    """Types that can store the tensor, smallest first: candidates, and fallback types for those its rows do not fit.

    Raises:
        InfeasibleBudgetError: not even 32-weight blocks divide the rows.
    """
    fitting = _fitting(tensor, candidates)
    if not fitting:
        option = "types" if tensor.role is Role.EXPERT else "dense_types"
        with_f16 = ",".join([*(candidate.name for candidate in candidates), TYPE_OF_ANY_ROWS.name])
        raise InfeasibleBudgetError(
            f"{tensor.name}: rows of {tensor.row_width} weights are not a multiple of any candidate's block "
            f"({', '.join(f'{c.name} {c.block_size}' for c in candidates)}), nor of 32; add "
            f"{TYPE_OF_ANY_ROWS.name} to them: --set sensitivity.{option}={with_f16}"
        )
    return fitting


def type_or_any(tensor: SourceTensor, quant_type: QuantType) -> QuantType:
    """The type asked for where rows fit it, else a fallback type, else the one that any rows fit."""
    return next(iter(_fitting(tensor, (quant_type,))), TYPE_OF_ANY_ROWS)


def _fitting(tensor: SourceTensor, candidates: Sequence[QuantType]) -> tuple[QuantType, ...]:
    stored = [stored_as(tensor, candidate) for candidate in candidates]
    fitting = [quant_type for quant_type in dict.fromkeys(stored) if quant_type is not None]
    if not fitting and TYPE_WITHOUT_IMPORTANCE.fits(tensor.row_width):
        fitting = [TYPE_WITHOUT_IMPORTANCE]
    return tuple(sorted(fitting, key=lambda quant_type: quant_type.bits_per_weight))


def absorbed_type(tensor: SourceTensor) -> QuantType:
    """The type of a matrix that cannot be measured."""
    return next(quant_type for quant_type in ABSORBED_TYPES if quant_type.fits(tensor.row_width))


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
        """Candidates of `tensor`: F32 alone for routers, norms and biases, one type for what is not measured."""
        if tensor.role is Role.KEEP:
            return (QUANT_TYPES["F32"],)
        if tensor.role is Role.ABSORBED:
            return fitting_types(tensor, self._above_floor(tensor.role, (absorbed_type(tensor),)))
        if tensor.role in (Role.DENSE, Role.OUTPUT) and not tensor.is_measured:
            return (type_or_any(tensor, UNMEASURED),)
        fitting, floor = fitting_types(tensor, self.offered(tensor.role)), self.floors.get(tensor.role)
        if floor is None:
            return fitting
        # A fallback type may have fewer bits than the candidate.
        least = floor.bits_per_weight
        enough = tuple(one for one in fitting if one.bits_per_weight >= least)
        return enough or tuple(one for one in FALLBACK_TYPES if one.bits_per_weight >= least)[:1] or fitting

    def offered(self, role: Role) -> tuple[QuantType, ...]:
        """The candidates of a role that are not below its floor; the floor itself where none is."""
        return self._above_floor(role, self.expert if role is Role.EXPERT else self.dense)

    def stored_as(self, tensor: SourceTensor, quant_type: QuantType) -> QuantType:
        """The type that `tensor` takes where `quant_type` is chosen for it and others together."""
        offered = self.of(tensor)
        stored = stored_as(tensor, quant_type)
        return stored if stored in offered else nearest_in_bits(quant_type, offered)

    def _above_floor(self, role: Role, candidates: tuple[QuantType, ...]) -> tuple[QuantType, ...]:
        floor = self.floors.get(role)
        if floor is None:
            return candidates
        least = floor.bits_per_weight
        return tuple(candidate for candidate in candidates if candidate.bits_per_weight >= least) or (floor,)


def candidate_types(
    expert: Sequence[str], dense: Sequence[str], floors: Mapping[str, str] | None = None
) -> CandidateTypes:
    """Candidates by the names of types, and floors by role.

    Raises:
        UsageError: an unknown type or role, or an empty list.
        MissingResourceError: libggml packs one of them, and cannot be used.
    """
    roles = [role.value for role in Role if role is not Role.KEEP]
    for role in floors or {}:
        if role not in roles:
            raise UsageError(f"plan.floors: {role} is no role: write one of {', '.join(roles)}, such as output=Q6_K")
    types = CandidateTypes(
        parse_types(",".join(expert)),
        parse_types(",".join(dense)),
        {Role(role): quant_type(name) for role, name in (floors or {}).items()},
    )
    check_available((*types.expert, *types.dense, *types.floors.values()))
    return types


DEFAULT_TYPES = candidate_types(DEFAULT_EXPERT_TYPES, DEFAULT_DENSE_TYPES)
