"""What calibration measured: sums and counts per layer, expert and modality, which add up over runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mode_gguf import __version__
from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.calibration.coverage import LayerCoverage, calibration_warnings
from mode_gguf.errors import InputError
from mode_gguf.forward.modality import MODALITIES, KeyTokens

EXPERTS_INPUT = "blk.{layer}.ffn_exps.input"
"""Activation that gate and up read."""
EXPERTS_HIDDEN = "blk.{layer}.ffn_exps.hidden"
"""Activation that down reads: the gated one."""


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """What the model was shown: samples without and with an image, and their text and vision tokens."""

    text_samples: int
    image_samples: int
    text_tokens: int
    vision_tokens: int

    def __add__(self, other: "SampleCounts") -> "SampleCounts":
        return SampleCounts(
            self.text_samples + other.text_samples,
            self.image_samples + other.image_samples,
            self.text_tokens + other.text_tokens,
            self.vision_tokens + other.vision_tokens,
        )


@dataclass(frozen=True, slots=True)
class CalibrationStatistics:
    """Statistics of a model's activations; arrays are named and shaped as docs/design/artefacts.md says.

    Attributes:
        model: name of the model.
        fingerprint: of its checkpoint.
        arrays: `{activation}.sum2`, `{activation}.count`, `blk.L.ffn_exps.weight`, `blk.L.ffn_exps.weight2`.
        samples: what it was shown.
        key_tokens: how key vision tokens were chosen.
        datasets: names of the data sets.
        imatrix: name of the importance matrix that they were taken from, which does not tell modalities apart: all
            tokens then count as text; None where the model was run.
        sees: whether the model takes images at all.
    """

    model: str
    fingerprint: str
    arrays: Mapping[str, np.ndarray]
    samples: SampleCounts
    key_tokens: KeyTokens
    datasets: Sequence[str]
    imatrix: str | None = None
    sees: bool = True

    @property
    def activations(self) -> list[str]:
        """Names of everything a sum of squares was taken of."""
        return [name.removesuffix(".count") for name in self.arrays if name.endswith(".count")]

    @property
    def moe_layers(self) -> list[int]:
        """Layers with routed experts, ascending."""
        suffix = EXPERTS_INPUT.partition("{layer}")[2]
        names = (name for name in self.activations if name.endswith(suffix))
        return sorted(int(name.removeprefix("blk.").removesuffix(suffix)) for name in names)

    def counts(self, layer: int) -> np.ndarray:
        """Routed tokens of one layer, int64 (M, E); a token counts once for each of its top-k experts."""
        return self.arrays[f"{EXPERTS_INPUT.format(layer=layer)}.count"]

    def routing_weights(self, layer: int) -> np.ndarray:
        """Sum of the routing weights each expert of one layer received, float64 (M, E)."""
        return self.arrays[f"blk.{layer}.ffn_exps.weight"]

    def coverage(self) -> list[LayerCoverage]:
        """Per layer, the experts that calibration says nothing about."""
        report = []
        for layer in self.moe_layers:
            counts = self.counts(layer)
            never = {
                name: tuple(int(expert) for expert in np.flatnonzero(row == 0))
                for name, row in zip(MODALITIES, counts, strict=True)
                if row.any()
            }
            report.append(LayerCoverage(layer, counts.shape[1], never))
        return report

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, atomically."""
        metadata = {
            "kind": "calibration",
            "tool_version": __version__,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "samples": asdict(self.samples),
            **({"imatrix": self.imatrix} if self.imatrix else {"key_tokens": asdict(self.key_tokens)}),
            "sees": self.sees,
            "datasets": list(self.datasets),
            "modalities": list(MODALITIES),
            "never_routed": {str(layer.layer): layer.never_routed for layer in self.coverage()},
            "warnings": calibration_warnings(self),
        }
        write_arrays(path, self.arrays, metadata)

    @classmethod
    def load(cls, path: Path, *, sums: bool = True) -> "CalibrationStatistics":
        """Read what `save` wrote.

        Args:
            sums: whether sums of squares are read, which take 99 % of the file.

        Raises:
            InputError: the file is missing, or is no calibration file of this version.
        """
        arrays, metadata = read_arrays(path, "calibration", without=None if sums else ".sum2")
        return cls(
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
            arrays=arrays,
            samples=SampleCounts(**metadata["samples"]),
            key_tokens=_key_tokens(metadata),
            datasets=tuple(metadata["datasets"]),
            imatrix=metadata.get("imatrix"),
            sees=metadata.get("sees", True),
        )


def _key_tokens(metadata: Mapping[str, Any]) -> KeyTokens:
    """As `save` wrote it, or a ratio alone, from before there was a choice of criteria; nobody chose for an imatrix."""
    if metadata.get("imatrix"):
        return KeyTokens()
    return KeyTokens(**metadata["key_tokens"]) if "key_tokens" in metadata else KeyTokens(ratio=metadata["key_ratio"])


def merge(first: CalibrationStatistics, second: CalibrationStatistics) -> CalibrationStatistics:
    """Statistics of both runs together, as if their samples had been one set.

    Raises:
        InputError: they belong to different models, or chose key tokens differently.
    """
    if first.fingerprint != second.fingerprint or set(first.arrays) != set(second.arrays):
        raise InputError(
            f"calibration files of {first.model} ({first.fingerprint}) and {second.model} ({second.fingerprint}) "
            "cannot be merged: they belong to different checkpoints"
        )
    if first.key_tokens != second.key_tokens:
        raise InputError(
            f"calibration files with key tokens by {first.key_tokens} and by {second.key_tokens} cannot be merged: "
            "run one of them again"
        )
    return CalibrationStatistics(
        model=first.model,
        fingerprint=first.fingerprint,
        arrays={name: array + second.arrays[name] for name, array in first.arrays.items()},
        samples=first.samples + second.samples,
        key_tokens=first.key_tokens,
        datasets=tuple(dict.fromkeys((*first.datasets, *second.datasets))),
        imatrix=first.imatrix or second.imatrix,
        sees=first.sees,
    )
