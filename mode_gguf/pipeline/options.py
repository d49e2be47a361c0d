"""What the stages can be told, and what a conversion tells."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mode_gguf.allocation.budget import Budget, Reach
from mode_gguf.allocation.presets import PRESETS, Preset
from mode_gguf.allocation.units import DEFAULT_TYPES, CandidateTypes, Granularity
from mode_gguf.forward.limits import HIDDEN_BYTES
from mode_gguf.gpu_memory.breakdown import MemoryBreakdown
from mode_gguf.importance.imatrix_kind import ImatrixKind
from mode_gguf.quantization.packing import DEFAULT_PACKING, Packing, Rounding

if TYPE_CHECKING:
    from mode_gguf.estimate.free_resources import FreeResources
    from mode_gguf.estimate.stage_estimates import StageEstimate
    from mode_gguf.forward.key_tokens import Criterion

DEFAULT_MEASURED_SAMPLES = 64
"""Calibration samples that KL is measured on, where it is measured rather than predicted."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What the model is run on, and where.

    `source` is as in `load_samples`; `key_ratio` is the share of an image's tokens that count as key vision tokens, and
    `key_tokens` the criterion that chooses them, see `mode_gguf.forward.key_tokens`. `hidden_bytes` of hidden
    states are kept in memory, further ones in temporary files, which changes no result.
    """

    source: str | None = None
    image_samples: int = 128
    text_samples: int = 128
    key_ratio: float = 0.2
    key_tokens: "Criterion" = "text-attention"
    device: str = "auto"
    seed: int = 0
    hidden_bytes: int = HIDDEN_BYTES
    from_imatrix: Path | None = None
    """An importance matrix that statistics are taken from instead of running the model."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Everything `convert` can be told; each stage takes the part it needs."""

    budget: Budget
    calibration: CalibrationOptions = CalibrationOptions()
    preset: Preset = PRESETS["mode"]
    granularity: Granularity = "tensor"
    refine: int = 0
    measured_samples: int = DEFAULT_MEASURED_SAMPLES
    imatrix: ImatrixKind | None = None
    packing: Packing = DEFAULT_PACKING
    rounding: Rounding | None = None
    """None for `Packing.default_rounding`."""
    types: CandidateTypes = DEFAULT_TYPES
    projector_type: str = "F16"
    pre_tokenizer: str | None = None
    shard_bytes: int | None = None
    """Most bytes of tensors in one file of the text model; None for one file."""
    threads: int | None = None
    validate: bool = True
    held_out: Path | None = None
    llama_cpp: Path | None = None
    restart: bool = False
    """Whether measuring stages run again whose settings differ from those of the last run in the folder."""


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion wrote, and how long each stage took (0 for one that was reused).

    `model` is the first file of one that is in shards; `size_bytes` counts all of them. Text-only models have no
    `mmproj`.
    """

    model: Path
    mmproj: Path | None
    imatrix: Path
    plan: Path
    report: Path | None
    page: Path
    bpw: float
    size_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a conversion will do, known from shapes alone."""

    model_name: str
    family: str
    reach: Reach
    model_bytes: int
    n_weights: int
    expert_weights: int
    layers: int
    experts: int
    stages: "tuple[StageEstimate, ...]"
    room: "FreeResources"
    memory: MemoryBreakdown | None = None
    """Where a GPU's memory will go, if that is the budget."""
