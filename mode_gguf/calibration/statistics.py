"""Calibration statistics: sums and counts per layer, expert and modality."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from mode_gguf import __version__
from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.calibration.coverage import LayerCoverage, calibration_warnings
from mode_gguf.forward.modality import MODALITIES, KeyTokens
from mode_gguf.options import CalibrationOptions, ComputeOptions
from mode_gguf.vocabulary import Device

EXPERTS_INPUT = "blk.{layer}.ffn_exps.input"
"""Name of the activation that gate and up projections read."""
EXPERTS_HIDDEN = "blk.{layer}.ffn_exps.hidden"
"""Name of the activation that down projections read: the gated one."""


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """Counts of calibration samples without and with an image, and of their text and vision tokens."""

    text_samples: int
    image_samples: int
    text_tokens: int
    vision_tokens: int


@dataclass(frozen=True, slots=True)
class CalibrationStatistics:
    """Statistics of a model's activations; arrays are named and shaped as docs/design/artefacts.md says.

    Attributes:
        model: name of the model.
        fingerprint: of its checkpoint.
        arrays: `{activation}.sum2`, `{activation}.count`, `blk.L.ffn_exps.weight`, `blk.L.ffn_exps.weight2`.
        samples: counts of samples and tokens.
        key_tokens: how key vision tokens were chosen.
        datasets: names of the data sets.
        imatrix: name of the importance matrix that they were taken from, which does not tell modalities apart: all
            tokens then count as text; None where the model was run.
        has_vision: whether the model takes images at all.
        options, device: calibration's options, which later stages take from here.
    """

    model: str
    fingerprint: str
    arrays: Mapping[str, np.ndarray]
    samples: SampleCounts
    key_tokens: KeyTokens
    datasets: Sequence[str]
    imatrix: str | None = None
    has_vision: bool = True
    options: CalibrationOptions = CalibrationOptions()
    device: Device = ComputeOptions.device

    @property
    def activations(self) -> list[str]:
        """Names of the activations with a sum of squares."""
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
        """Experts that no token was routed to, per layer and modality."""
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
            "has_vision": self.has_vision,
            "options": to_jsonable_python(self.options),
            "device": self.device,
            "datasets": list(self.datasets),
            "modalities": list(MODALITIES),
            "never_routed": {str(layer.layer): layer.never_routed for layer in self.coverage()},
            "warnings": calibration_warnings(self),
        }
        write_arrays(path, self.arrays, metadata)

    @classmethod
    def load(cls, path: Path, *, sums: bool = True) -> "CalibrationStatistics":
        """Read the file that `save` wrote.

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
            key_tokens=KeyTokens(**metadata["key_tokens"]) if "key_tokens" in metadata else KeyTokens(),
            datasets=tuple(metadata["datasets"]),
            imatrix=metadata.get("imatrix"),
            has_vision=metadata["has_vision"],
            options=TypeAdapter(CalibrationOptions).validate_python(metadata["options"]),
            device=metadata["device"],
        )
