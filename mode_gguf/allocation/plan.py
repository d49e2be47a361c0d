"""plan.json: the types of a file's tensors. People may edit it; `export` obeys it and needs nothing else to decide.

What follows from the types (sizes, bits per weight, the type that names the file) is computed from them whenever a plan
is made or read, so that an edited one cannot say something else.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.presets import Preset
from mode_gguf.artifacts import Record, fingerprint, read_record, write_text
from mode_gguf.errors import InputError
from mode_gguf.gpu_memory.breakdown import MemoryBreakdown
from mode_gguf.options import Packing
from mode_gguf.quantization.expert_groups import layer_groups, stored_types
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import INDEX, QUANT_TYPES, QuantType, bits_per_weight, type_of_most_weights
from mode_gguf.vocabulary import Rounding

_EXPERTS: Final = re.compile(r"blk\.\d+\.ffn_\w+_exps\.weight")


class PlannedTensor(Record):
    """One tensor of the model. `cost` is its share of the objective; None where there was nothing to choose.

    Where every expert has its own type, `experts` names them in order, and `type` is that of most.
    """

    name: str
    type: str
    experts: list[str] | None = None
    n_weights: Annotated[int, Field(gt=0)]
    size_bytes: Annotated[int, Field(gt=0)]
    cost: float | None = None

    @property
    def types(self) -> list[str]:
        """Type of every expert, or of the tensor as a whole."""
        return [self.type] if self.experts is None else self.experts


class SolverRecord(Record):
    """The solver's proof of the choice; costs are nats of KL for Fisher sensitivity."""

    solver: str
    objective: float
    bound: float
    gap: float


class RefinementTrial(Record):
    """A plan that was measured on the way to this one: KL in nats per scored position of text and of image answers."""

    kl: tuple[float, ...]
    size_bytes: int
    moved: tuple[str, ...]
    """Tensors whose type differs from the best plan before."""
    accepted: bool
    """Whether it is the best one since; the first plan always is."""


class Provenance(Record):
    """Inputs of a plan: tool version, model, importance matrix and sensitivity."""

    tool_version: str
    model: str
    model_fingerprint: str
    repository: str | None = None
    """`owner/name` on the hub; None, like the commit, for a folder that does not say."""
    revision: str | None = None
    imatrix: str | None = None
    """Fingerprint of the importance matrix; `imatrix_kind` says which of the folder's it is."""
    imatrix_kind: Literal["plain", "fisher"] = "plain"
    sensitivity_method: str | None = None
    sensitivity_fingerprint: str | None = None


class Plan(Record):
    """Types of all tensors of the text model, the budget they were chosen for, and how well that was done."""

    schema_version: Literal[1] = 1
    made_from: Provenance
    preset: str
    signals: Preset | None = None
    """The preset with all its parts, as options may have changed them; None for a plan that weighs nothing."""
    budget: Budget | None = None
    """The budget it was chosen for; None for a plan without."""
    memory: MemoryBreakdown | None = None
    """GPU memory by use, for a plan made to fit into it."""
    bpw: float
    experts_bpw: float
    size_bytes: int
    packing: Packing = EXACT
    rounding: Rounding = "nearest"
    """Rounding of K-quants; costs were measured with it."""
    main_type: str
    """The expert type that holds most weights; names the file."""
    solver: SolverRecord | None = None
    refinement: list[RefinementTrial] | None = None
    """Measured plans, the solver's first; None where it was not refined."""
    reachable_bpw: tuple[float, float] | None = None
    tensors: list[PlannedTensor]

    @property
    def is_edited(self) -> bool:
        """Whether the types are not those that were chosen for the budget: then nothing is proven of them."""
        return self.budget is not None and self.solver is None

    @property
    def fingerprint(self) -> str:
        """Digest of what a file is made by and its card says; proofs, costs and trials are no part of it."""
        return fingerprint(self.as_edited().model_dump(mode="json"))

    @property
    def types(self) -> dict[str, QuantType]:
        return {tensor.name: QUANT_TYPES[tensor.type] for tensor in self.tensors}

    @property
    def experts(self) -> dict[str, tuple[QuantType, ...]]:
        """Types of the experts in order, of tensors with one per expert."""
        return {
            tensor.name: tuple(QUANT_TYPES[name] for name in tensor.experts)
            for tensor in self.tensors
            if tensor.experts is not None
        }

    @property
    def stored_types(self) -> dict[str, QuantType]:
        """Types of the tensors of the file, by their names there.

        Raises:
            InputError: tensors of a layer have different numbers of experts.
        """
        return stored_types(self.types, self.experts)

    @property
    def has_expert_groups(self) -> bool:
        """Whether experts of some layer differ in type, so that stock llama.cpp cannot load the file."""
        return bool(layer_groups(self.experts))

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing is packed, so that an importance matrix would mean nothing."""
        return all(quant_type.block_size == 1 for quant_type in self.types.values())

    def save(self, path: Path) -> None:
        """Write the plan, atomically."""
        write_text(path, self.model_dump_json(indent=1, exclude_none=True) + "\n")

    def as_edited(self) -> "Plan":
        """The plan without what was found out about types that it no longer has: proof, costs, trials and memory."""
        tensors = [tensor.model_copy(update={"cost": None}) for tensor in self.tensors]
        return self.model_copy(update={"tensors": tensors, "solver": None, "refinement": None, "memory": None})

    @staticmethod
    def load(path: Path) -> "Plan":
        """Read and check a plan; one whose sizes are not those of its types was edited, and gets the right ones.

        Raises:
            InputError: not there, not JSON, or a field that makes no sense; the message names it.
        """
        plan = read_record(path, Plan, "plan")
        if plan.main_type not in QUANT_TYPES:
            raise InputError(f"{path}: main_type is {plan.main_type!r:.200}, expected one of {', '.join(QUANT_TYPES)}")
        for tensor in plan.tensors:
            _check(path, tensor)
        if not plan.tensors:
            return plan
        if len({tensor.name for tensor in plan.tensors}) < len(plan.tensors):
            raise InputError(f"{path}: a tensor is named twice; make a new plan")
        if not any(map(_is_expert, plan.tensors)):
            raise InputError(f"{path}: names no tensor of experts (blk.N.ffn_*_exps.weight); make a new plan")
        try:
            right = sizes_of([tensor.model_copy(update={"size_bytes": _bytes(tensor)}) for tensor in plan.tensors])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        as_stored = right["tensors"] == plan.tensors and all(
            math.isclose(right[name], getattr(plan, name), rel_tol=1e-9) for name in _SIZES
        )
        if as_stored and right["main_type"] == plan.main_type:
            return plan
        return plan.model_copy(update=right).as_edited()


_SIZES: Final = ("size_bytes", "bpw", "experts_bpw")


def sizes_of(tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """Fields of a plan that follow from its tensors; maps of experts count as bytes, not as weights.

    Raises:
        InputError: expert tensors of a layer have different numbers of experts.
    """
    experts = [tensor for tensor in tensors if _is_expert(tensor)]
    by_expert = {tensor.name: [QUANT_TYPES[name] for name in tensor.experts] for tensor in tensors if tensor.experts}
    maps = sum(len(groups) * sum(len(one.experts) for one in groups) for groups in layer_groups(by_expert).values())
    size = sum(tensor.size_bytes for tensor in tensors) + maps * INDEX.type_size
    return {
        "tensors": list(tensors),
        "bpw": 8 * size / sum(tensor.n_weights for tensor in tensors),
        "experts_bpw": bits_per_weight(experts),
        "size_bytes": size,
        "main_type": type_of_most_weights(
            (QUANT_TYPES[name], tensor.n_weights // len(tensor.types)) for tensor in experts for name in tensor.types
        ).name,
    }


def _is_expert(tensor: PlannedTensor) -> bool:
    return _EXPERTS.fullmatch(tensor.name) is not None


def _bytes(tensor: PlannedTensor) -> int:
    """Bytes of the tensor in its types, whose blocks its rows are a multiple of."""
    one = tensor.n_weights // len(tensor.types)
    blocks = ((one // kind.block_size, kind.type_size) for kind in (QUANT_TYPES[name] for name in tensor.types))
    return sum(number * size for number, size in blocks)


def _check(path: Path, tensor: PlannedTensor) -> None:
    """Types are known and go with the tensor's weights.

    Raises:
        InputError: they do not.
    """
    for name in (tensor.type, *tensor.types):
        if name not in QUANT_TYPES:
            raise InputError(f"{path}: {tensor.name:.200} has unknown type {name!r:.200}")
    if not tensor.types or tensor.n_weights % len(tensor.types):
        raise InputError(
            f"{path}: {tensor.name:.200} has types of {len(tensor.types)} experts, which do not divide its "
            f"{tensor.n_weights} weights; make a new plan"
        )
    one = tensor.n_weights // len(tensor.types)
    most = type_of_most_weights((QUANT_TYPES[name], one) for name in tensor.types).name
    if tensor.type != most:
        raise InputError(
            f"{path}: {tensor.name:.200} has type {tensor.type}, but most of its experts have {most}; edit `experts`, "
            "which counts, or remove it"
        )
    for name in set(tensor.types):
        if one % (block := QUANT_TYPES[name].block_size):
            raise InputError(
                f"{path}: {tensor.name:.200} has type {name}, whose blocks of {block} do not divide {one} weights; "
                "choose a type with smaller blocks"
            )
