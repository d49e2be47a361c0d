"""The unit KL table: its file, its comparison with Fisher predictions, and its split over single experts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mode_gguf import __version__
from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.errors import InputError
from mode_gguf.forward.modality import ANSWERS, MODALITIES
from mode_gguf.importance.known_sums import known_sum
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.options import Packing
from mode_gguf.vocabulary import ImatrixKind

KIND = "unit-kl"


@dataclass(frozen=True, slots=True)
class UnitKl:
    """Measured KL of every unit.

    Attributes:
        model: name of the model; fingerprint: of its checkpoint.
        expert_types: names along the last axis of expert tensors' arrays; dense_types: of all others.
        arrays: `{tensor}.unit`, float64 (A, M, T): KL in nats per scored position of that answer type when tokens of
            that modality pass through the tensor in that type; NaN where it cannot be stored so.
        positions: scored positions per answer type.
        seed: of the choice of samples.
        imatrix: which importance matrix weights were packed with; packing: how.
    """

    model: str
    fingerprint: str
    expert_types: tuple[str, ...]
    dense_types: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]
    positions: tuple[int, ...]
    seed: int
    imatrix: ImatrixKind
    packing: Packing

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, atomically."""
        metadata = {
            "kind": KIND,
            "tool_version": __version__,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "types": {"expert": self.expert_types, "dense": self.dense_types},
            "positions": self.positions,
            "seed": self.seed,
            "imatrix": self.imatrix,
            "packing": asdict(self.packing),
            "answers": ANSWERS,
            "modalities": MODALITIES,
        }
        write_arrays(path, self.arrays, metadata)

    @classmethod
    def load(cls, path: Path) -> "UnitKl":
        """Read the file that `save` wrote.

        Raises:
            InputError: the file is missing, or holds something else.
        """
        arrays, metadata = read_arrays(path, KIND)
        return cls(
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
            expert_types=tuple(metadata["types"]["expert"]),
            dense_types=tuple(metadata["types"]["dense"]),
            arrays=arrays,
            positions=tuple(metadata["positions"]),
            seed=metadata["seed"],
            imatrix=metadata["imatrix"],
            packing=Packing(**metadata["packing"]),
        )


@dataclass(frozen=True, slots=True)
class KlComparison:
    """Predicted and measured KL of some tensors, each in this type, added up over them and over modalities.

    Attributes:
        part: `blk.L experts`, `blk.L attention`, or the tensor's name.
        predicted: nats per scored position by answer type; measured: likewise.
    """

    part: str
    quant_type: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


def compare_kl(measured: UnitKl, predicted: SensitivityTable) -> list[KlComparison]:
    """Comparisons of predicted and measured KL: per layer and type that both have, experts and attention apart."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    for name, values in measured.arrays.items():
        is_expert = "_exps." in name
        types = (measured.expert_types, predicted.expert_types) if is_expert else None
        of_measured, of_predicted = types or (measured.dense_types, predicted.dense_types)
        tensor = name.removesuffix(".unit")
        part = f"{_layer_of(tensor)} {'experts' if is_expert else 'attention'}" if tensor.startswith("blk.") else tensor
        for t, quant_type in enumerate(of_measured):
            if quant_type in of_predicted and name in predicted.arrays:
                costs = predicted.arrays[name][..., of_predicted.index(quant_type)], values[..., t]
                total = sums.setdefault((part, quant_type), np.zeros((2, len(values))))
                total += [np.nansum(array, axis=-1) for array in costs]
    return [
        KlComparison(part, quant_type, tuple(total[0].tolist()), tuple(total[1].tolist()))
        for (part, quant_type), total in sums.items()
    ]


def split_over_experts(measured: UnitKl, by: SensitivityTable) -> SensitivityTable:
    """Sensitivity table `by` with every unit as measured, and its experts scaled to add up to that.

    Per answer, modality and type, the experts of a tensor get its measured KL in the proportions they have in `by`,
    equal ones where `by` has nothing but zeros. `blk.L.ffn_exps` (all projections of an expert) is scaled by the
    summed measured KL of the layer's projections over their experts' sum in `by`. A table without answer types (A = 1)
    lends its proportions to both.

    Args:
        by: experts' values must add up: a mean error must be multiplied by the experts' frequencies first.

    Raises:
        InputError: the tables are of different checkpoints, types, importance matrices or packings.
    """
    for field in ("fingerprint", "expert_types", "dense_types", "imatrix", "packing"):
        if getattr(measured, field) != getattr(by, field):
            raise InputError(
                f"unit-kl was measured with {field} {getattr(measured, field)}, sensitivity with {getattr(by, field)}; "
                "measure both on the same checkpoint with the same options"
            )
    arrays = dict(measured.arrays)
    projections: dict[str, list[str]] = {}
    for name, values in by.arrays.items():
        tensor = name.removesuffix(".expert")
        if tensor != name and f"{tensor}.unit" in measured.arrays:
            arrays[name] = _scaled(values, measured.arrays[f"{tensor}.unit"], values.sum(axis=2))
            projections.setdefault(_layer_of(tensor), []).append(tensor)
    for layer, tensors in projections.items():
        whole = by.arrays[f"{layer}.ffn_exps.expert"]
        unit = known_sum([measured.arrays[f"{tensor}.unit"] for tensor in tensors])
        total = known_sum([by.arrays[f"{tensor}.expert"].sum(axis=2) for tensor in tensors])
        arrays[f"{layer}.ffn_exps.expert"] = _scaled(whole, unit, total)
    return replace(by, arrays=arrays, positions=measured.positions)


def _layer_of(tensor: str) -> str:
    return ".".join(tensor.split(".")[:2])


def _scaled(per_expert: np.ndarray, target: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Costs (A or 1, M, E, T) times target (A, M, T) / total (A or 1, M, T); equal shares where total is 0."""
    share = np.divide(
        per_expert,
        total[:, :, None, :],
        out=np.full(per_expert.shape, 1 / per_expert.shape[2]),
        where=total[:, :, None, :] != 0,
    )
    return np.asarray(share * target[:, :, None, :])
