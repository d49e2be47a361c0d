"""plan.json: the types of a file's tensors. People may edit it; `export` obeys it and needs nothing else to decide."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.presets import Preset
from mode_gguf.artifacts import Record, read_record, write_text
from mode_gguf.errors import InputError
from mode_gguf.gpu_memory.breakdown import MemoryBreakdown
from mode_gguf.options import Packing
from mode_gguf.quantization.expert_groups import layer_groups, stored_types
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from mode_gguf.vocabulary import Rounding


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

    @staticmethod
    def load(path: Path) -> "Plan":
        """Read and check a plan.

        Raises:
            InputError: not there, not JSON, or a field that makes no sense; the message names it.
        """
        plan = read_record(path, Plan, "plan")
        for tensor in plan.tensors:
            for name in (tensor.type, *(tensor.experts or ())):
                if name not in QUANT_TYPES:
                    raise InputError(f"{path}: {tensor.name} has unknown type {name!r}")
        return plan
