"""Options that several commands share, declared once so that they read and behave the same everywhere."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # the library is imported when a command runs, so that --help stays instant
    from mode_gguf.allocation.units import CandidateTypes
    from mode_gguf.pipeline import CalibrationOptions
    from mode_gguf.quantization.packing import Packing


class Device(StrEnum):
    """Where torch computes."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class PresetName(StrEnum):
    """Ways of measuring and weighing; see `mode_gguf.allocation.planner.PRESETS`."""

    MODE = "mode"
    PAPER = "paper"


class ImatrixName(StrEnum):
    """Importance matrices; see `mode_gguf.importance.choice`."""

    PLAIN = "plain"
    FISHER = "fisher"


class PackingMode(StrEnum):
    """How K-quants are packed; see `mode_gguf.quantization.packing`."""

    EXACT = "exact"
    REFINED = "refined"


class Effort(StrEnum):
    """How long refined packing searches."""

    FAST = "fast"
    DEFAULT = "default"
    MAX = "max"


class KeyTokensName(StrEnum):
    """Ways of choosing key vision tokens; see `mode_gguf.calibration.key_tokens`."""

    TEXT_ATTENTION = "text-attention"
    ALL = "all"
    REDUNDANT = "redundant"
    RANDOM = "random"
    RECEIVED_ATTENTION = "received-attention"
    MAX_MIN_DIVERSITY = "max-min-diversity"


class ProjectorType(StrEnum):
    """Types the projector can be stored in."""

    F16 = "F16"
    BF16 = "BF16"
    F32 = "F32"
    Q8_0 = "Q8_0"


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of the Hugging Face checkpoint.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(help="Work folder for everything written; default: <model name>-mode-gguf in the current folder."),
]
Bpw = Annotated[
    float,
    typer.Option(help="Bits per weight of the whole text model: all its tensor bits over all its weights."),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|DATASET",
        help="Samples: a folder or JSONL in ShareGPT4V form, text files, or the name of a Hugging Face data set; "
        "default: a built-in set of photos, charts, documents, prose, code and several languages.",
    ),
]
ImageSamples = Annotated[int, typer.Option(help="Samples with an image to use at most.")]
TextSamples = Annotated[int, typer.Option(help="Text samples to use at most.")]
KeyRatio = Annotated[
    float, typer.Option(help="Share of an image's tokens kept as key vision tokens.", min=0.001, max=1.0)
]
KeyTokensOption = Annotated[
    KeyTokensName,
    typer.Option(
        help="Which of them: text-attention: those the text looks at (the paper's choice); received-attention: those "
        "that all later tokens look at; max-min-diversity: those that differ most; for comparison: all, redundant "
        "(those the text looks at least), random."
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="Where torch computes.")]
PresetOption = Annotated[
    PresetName,
    typer.Option(
        help="mode: Fisher sensitivity (our default); paper: frequency times expert error, as in arXiv 2606.17118."
    ),
]
ImatrixOption = Annotated[
    ImatrixName | None,
    typer.Option(
        help="What packing weighs a matrix's columns with: plain: mean squares of its inputs; "
        "fisher: those weighed by gradients; default: fisher where there are gradients (not with --preset paper).",
        show_default=False,
    ),
]
PackingOption = Annotated[
    PackingMode,
    typer.Option(
        help="How K-quants are packed: refined: with less error; exact: byte for byte as llama-quantize would."
    ),
]
EffortOption = Annotated[Effort, typer.Option(help="How long refined packing searches.")]
SizePower = Annotated[
    float,
    typer.Option(
        help="Refined packing weighs a weight's error with importance times this power of its size squared, "
        "0, 0.5, 1, ...; 0 is the importance alone."
    ),
]
ExpertTypes = Annotated[str, typer.Option("--types", help="Candidate types of expert tensors, comma-separated.")]
DenseTypes = Annotated[str, typer.Option(help="Candidate types of attention, embedding and output tensors.")]
ProjectorOption = Annotated[ProjectorType, typer.Option("--mmproj-type", help="Type of the projector's matrices.")]
Threads = Annotated[int | None, typer.Option(help="Threads that pack; default: all cores.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
PreTokenizer = Annotated[
    str | None,
    typer.Option(help="llama.cpp's name of the pre-tokenizer, for a tokenizer that is not recognised."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        help="Folder of your llama.cpp tools; default: MODE_GGUF_LLAMA_CPP, then PATH, then the embedded build.",
        envvar="MODE_GGUF_LLAMA_CPP",
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        help="Held-out folder with text.jsonl and questions.jsonl to validate on; default: a small built-in set.",
    ),
]

DEFAULT_SIZE_POWER = 0.0
DEFAULT_EXPERT_TYPES = "Q2_K,Q3_K,Q4_K"
DEFAULT_DENSE_TYPES = "Q4_K,Q5_K,Q6_K,Q8_0"


def candidate_types(expert: str, dense: str) -> "CandidateTypes":
    """Candidates from two comma-separated lists.

    Raises:
        UsageError: a name is unknown, or a list is empty.
        MissingResourceError: libggml packs one of them, and cannot be used.
    """
    from mode_gguf.allocation.units import CandidateTypes
    from mode_gguf.quantization.libggml import check_available
    from mode_gguf.quantization.types import parse_types

    types = CandidateTypes(expert=parse_types(expert), dense=parse_types(dense))
    check_available((*types.expert, *types.dense))
    return types


def packing_of(mode: PackingMode, effort: Effort, size_power: float) -> "Packing":
    """The library's packing from the command line's.

    Raises:
        UsageError: the power is none that is supported.
    """
    from mode_gguf.quantization.packing import Packing

    return Packing(mode.value, effort.value, size_power)


def calibration_options(
    source: str | None,
    image_samples: int,
    text_samples: int,
    key_ratio: float,
    key_tokens: KeyTokensName,
    device: Device,
    seed: int,
) -> "CalibrationOptions":
    """The pipeline's calibration options from the command line's."""
    from mode_gguf.pipeline import CalibrationOptions

    return CalibrationOptions(source, image_samples, text_samples, key_ratio, key_tokens.value, device.value, seed)
