"""The sensitivity table: the cost of every candidate type of every tensor and expert."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mode_gguf import __version__
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.errors import InputError
from mode_gguf.forward.modality import ANSWERS, MODALITIES
from mode_gguf.options import Packing
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QuantType
from mode_gguf.vocabulary import ImatrixKind, Method

METHODS: tuple[Method, ...] = ("fisher", "expert-mse", "block-mse")
"""Sensitivity methods that run the model."""


@dataclass(frozen=True, slots=True)
class SensitivityTable:
    """Sensitivities, named and shaped as docs/design/artefacts.md says; NaN where a tensor cannot be stored in a type.

    Attributes:
        model: name of the model.
        fingerprint: of its checkpoint.
        method: `fisher` (KL in nats per scored position), `expert-mse` or `block-mse` (mean squared errors), or
            `imatrix-error` (shares of outputs' energy, of all tokens alike).
        expert_types: names along the last axis of expert tensors' arrays.
        dense_types: names along the last axis of all other arrays.
        arrays: `{tensor}.unit`, `{tensor}.expert`, `blk.L.ffn_exps.expert`, and the `.weight_error` of all three.
        positions: scored positions per answer type.
        draws: label draws per position; 0 where nothing is drawn.
        seed: of the draws.
        estimated: experts per (layer, answer, modality) that no token reached, whose values are estimates.
        imatrix: which importance matrix candidates were packed with; packing: how.
        fallback_types: of tensors whose rows do not fit all types, names of the types measured instead, in order.
    """

    model: str
    fingerprint: str
    method: Method
    expert_types: Sequence[str]
    dense_types: Sequence[str]
    arrays: Mapping[str, np.ndarray]
    positions: Sequence[int]
    draws: int
    seed: int
    estimated: Mapping[str, Sequence[int]]
    imatrix: ImatrixKind = "plain"
    packing: Packing = EXACT
    fallback_types: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def n_units(self) -> int:
        """Number of matrices, each expert's for itself, times the types that each was measured in."""
        units = 0
        for name, array in self.arrays.items():
            if name.endswith(".weight.weight_error"):
                stored = self.fallback_types.get(name.removesuffix(".weight_error"), range(array.shape[1]))
                distinct = [t for t, one in enumerate(stored) if one not in list(stored)[:t]]
                units += int(np.isfinite(array[:, distinct]).sum())
        return units

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, atomically."""
        metadata = {
            "kind": "sensitivity",
            "tool_version": __version__,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "types": {"expert": list(self.expert_types), "dense": list(self.dense_types)},
            "positions": list(self.positions),
            "units": self.n_units,
            "draws": self.draws,
            "seed": self.seed,
            "estimated": self.estimated,
            "imatrix": self.imatrix,
            "packing": asdict(self.packing),
            "stand_ins": self.fallback_types,
            "answers": list(ANSWERS),
            "modalities": list(MODALITIES),
        }
        write_arrays(path, self.arrays, metadata)

    @classmethod
    def load(cls, path: Path) -> "SensitivityTable":
        """Read the file that `save` wrote.

        Raises:
            InputError: the file is missing, or is no sensitivity file of this version.
        """
        arrays, metadata = read_arrays(path, "sensitivity")
        return cls(
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
            method=metadata["method"],
            expert_types=tuple(metadata["types"]["expert"]),
            dense_types=tuple(metadata["types"]["dense"]),
            arrays=arrays,
            positions=tuple(metadata["positions"]),
            draws=metadata["draws"],
            seed=metadata["seed"],
            estimated={key: tuple(value) for key, value in metadata["estimated"].items()},
            imatrix=metadata.get("imatrix", "plain"),  # the only one there was before the choice
            packing=Packing(**metadata["packing"]) if "packing" in metadata else EXACT,
            fallback_types={key: tuple(value) for key, value in metadata.get("stand_ins", {}).items()},
        )


def check_costs(
    arrays: Mapping[str, np.ndarray], tensor: SourceTensor, types: Sequence[QuantType], fitting: Sequence[bool]
) -> None:
    """Refuse costs of a matrix that are beyond the range of the numbers they are added up in.

    Args:
        arrays: as in `SensitivityTable`.
        types: along the last axis of the tensor's arrays.
        fitting: which of them it was measured in.

    Raises:
        InputError: a cost in one of these types is NaN or infinite; it names tensor, expert and type.
    """
    for kind in ("unit", "expert", "weight_error"):
        array = arrays.get(f"{tensor.name}.{kind}")
        if array is None:
            continue
        broken = ~np.isfinite(array) & np.asarray(fitting)
        if broken.any():
            *_, expert, number = (int(axis[0]) for axis in np.nonzero(broken.reshape(-1, *broken.shape[-2:])))
            where = f", expert {expert}," if kind != "unit" and tensor.role is Role.EXPERT else ""
            raise InputError(
                f"sensitivity: errors of {tensor.name}{where} in {types[number].name} are NaN or infinite: its weights "
                "or what they are multiplied with are so large that squares are beyond float32 (3.4e+38); they are a "
                "fault of the checkpoint, use the one it was made from"
            )
