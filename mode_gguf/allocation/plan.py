"""plan.json: the recipe of one file. People may edit it; `export` obeys it and needs nothing else to decide."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError

from mode_gguf.artifacts import write_text
from mode_gguf.errors import InputError
from mode_gguf.quantization.types import QUANT_TYPES, QuantType


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedTensor(_Strict):
    """One tensor of the file. `cost` is its share of the objective; None where there was nothing to choose."""

    name: str
    type: str
    n_weights: Annotated[int, Field(gt=0)]
    size_bytes: Annotated[int, Field(gt=0)]
    cost: float | None = None


class SolverRecord(_Strict):
    """What was proven about the choice; costs are nats of KL for Fisher sensitivity."""

    solver: str
    objective: float
    bound: float
    gap: float


class ExpertGranularity(_Strict):
    """The same budget with one type per expert: predicted, not written, because stock llama.cpp cannot load it."""

    record: SolverRecord
    experts_bpw: float
    types: dict[str, list[str]]
    """Layer number to the types of its experts in order."""


class Provenance(_Strict):
    """What the plan was made from."""

    tool_version: str
    model: str
    model_fingerprint: str
    imatrix: str | None = None
    sensitivity_method: str | None = None
    sensitivity_fingerprint: str | None = None


class Plan(_Strict):
    """Types of all tensors of the text model, the budget they were chosen for, and how well that was done."""

    schema_version: Literal[1] = 1
    made_from: Provenance
    preset: str
    target_bpw: float | None = None
    bpw: float
    experts_bpw: float
    size_bytes: int
    main_type: str
    """The expert type that holds most weights; names the file."""
    solver: SolverRecord | None = None
    expert_granularity: ExpertGranularity | None = None
    reachable_bpw: tuple[float, float] | None = None
    tensors: list[PlannedTensor]

    @property
    def types(self) -> dict[str, QuantType]:
        return {tensor.name: QUANT_TYPES[tensor.type] for tensor in self.tensors}

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
        try:
            plan = Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a plan ({error})") from error
        except PydanticError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {where}: {first['msg']}") from error
        for tensor in plan.tensors:
            if tensor.type not in QUANT_TYPES:
                raise InputError(f"{path}: {tensor.name} has unknown type {tensor.type!r}")
        return plan


def bits_per_weight(tensors: Sequence[PlannedTensor]) -> float:
    """All bits of the tensors over all their weights."""
    return 8 * sum(tensor.size_bytes for tensor in tensors) / sum(tensor.n_weights for tensor in tensors)


def most_common_type(tensors: Sequence[PlannedTensor]) -> str:
    """The type that holds most weights."""
    weights: Mapping[str, int] = {
        name: sum(tensor.n_weights for tensor in tensors if tensor.type == name)
        for name in sorted({tensor.type for tensor in tensors})
    }
    return max(weights, key=lambda name: weights[name])
