"""Options that several commands share, declared once so that they read and behave the same everywhere."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # the library is imported when a command runs, so that --help stays instant
    from mode_gguf.allocation.budget import Budget
    from mode_gguf.allocation.presets import Preset
    from mode_gguf.allocation.units import CandidateTypes
    from mode_gguf.architectures.tensors import Role
    from mode_gguf.pipeline import Base, CalibrationOptions
    from mode_gguf.quantization.packing import Packing
    from mode_gguf.quantization.types import QuantType
    from mode_gguf.workfolder import WorkFolder


class Device(StrEnum):
    """Where torch computes."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class PresetName(StrEnum):
    """Ways of measuring, weighing and budgeting; see `mode_gguf.allocation.presets`."""

    MODE = "mode"
    PAPER = "paper"
    PMQ = "pmq"


class MetricName(StrEnum):
    """Sensitivity metrics; see `mode_gguf.importance.sensitivity_table`."""

    FISHER = "fisher"
    EXPERT_MSE = "expert-mse"
    BLOCK_MSE = "block-mse"
    IMATRIX_ERROR = "imatrix-error"


class KvTypeName(StrEnum):
    """Types of the KV cache; see `mode_gguf.gpu_memory.fit_settings`."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


class CombinationName(StrEnum):
    """What an expert's cost is made of; see `mode_gguf.allocation.costs`."""

    SENSITIVITY = "sensitivity"
    PRODUCT = "product"
    FREQUENCY = "frequency"
    PMQ = "pmq"
    RANDOM = "random"


class ScopeName(StrEnum):
    """What shares one budget."""

    MODEL = "model"
    LAYER = "layer"


class DenseName(StrEnum):
    """How attention, embedding and output get their types."""

    MEASURED = "measured"
    FIXED = "fixed"


class ImatrixName(StrEnum):
    """Importance matrices; see `mode_gguf.importance.imatrix_kind`."""

    PLAIN = "plain"
    FISHER = "fisher"


class PackingMode(StrEnum):
    """How K-quants are packed; see `mode_gguf.quantization.packing`."""

    EXACT = "exact"
    REFINED = "refined"


class RoundingName(StrEnum):
    """How weights become levels; see `mode_gguf.quantization.packing.Rounding`."""

    NEAREST = "nearest"
    FEEDBACK = "feedback"


class GranularityName(StrEnum):
    """What shares one type; see `mode_gguf.allocation.units.Granularity`."""

    TENSOR = "tensor"
    EXPERT = "expert"


GRANULARITY_HELP = (
    "tensor: a type per tensor, as stock llama.cpp loads it; expert: a type per expert, for which "
    "`mode-gguf runtime build` makes a llama.cpp."
)


class Effort(StrEnum):
    """How long refined packing searches."""

    FAST = "fast"
    DEFAULT = "default"
    MAX = "max"


class KeyTokensName(StrEnum):
    """Ways of choosing key vision tokens; see `mode_gguf.forward.key_tokens`."""

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
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of the Hugging Face checkpoint, or its name on the hub: ORG/NAME or ORG/NAME@REVISION.",
        show_default=False,
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder of the Hugging Face checkpoint, or its name on the hub: ORG/NAME or ORG/NAME@REVISION. Not needed "
        "with --base-gguf and --calibration-from.",
        show_default=False,
    ),
]
BaseGguf = Annotated[
    Path | None,
    typer.Option(
        "--base-gguf",
        metavar="FILE",
        help="Take names, metadata and tensors of the text model from a GGUF in full precision that llama.cpp's "
        "converter made of MODEL, the first shard of a split one; for MoE models that are not known here.",
        show_default=False,
    ),
]
BaseMmproj = Annotated[
    Path | None,
    typer.Option("--base-mmproj", metavar="FILE", help="The projector that goes with --base-gguf.", show_default=False),
]
CalibrationFrom = Annotated[
    Path | None,
    typer.Option(
        "--calibration-from",
        metavar="IMATRIX",
        help="Take statistics from llama-imatrix's GGUF file instead of running the model: needs no torch, and does "
        "not tell text from images.",
        show_default=False,
    ),
]
Finished = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Work folder of a finished conversion.", show_default="the current folder"),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        help="The original model on the hub, where it was converted from a folder that does not say.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Work folder for everything written; default: <model name>-mode-gguf in the current folder."),
]
Bpw = Annotated[
    float | None,
    typer.Option(
        help="Budget: bits per weight of the whole text model, all its tensor bits over all its weights. Default: 3.0.",
        show_default=False,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Budget: size of the text model's file, such as 12GiB.", show_default=False),
]
ExpertBpw = Annotated[
    float | None,
    typer.Option(
        help="Budget: bits per weight of the routed experts; everything else takes the largest of --dense-types.",
        show_default=False,
    ),
]
_FIT = "A GPU's memory as the budget"
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Budget: the memory of the GPU that the model is going to run on, such as 24GiB; the text model gets what "
        "KV cache, projector, compute buffers and the reserve leave of it.",
        show_default=False,
        rich_help_panel=_FIT,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        help="With --fit: tokens of context, of all parallel sequences together (llama-server's -c).",
        min=1,
        max=1 << 24,
        show_default=False,
        rich_help_panel=_FIT,
    ),
]
Parallel = Annotated[
    int | None,
    typer.Option(
        help="With --fit: sequences answered at the same time, which share the context; default: 1.",
        min=1,
        max=256,
        show_default=False,
        rich_help_panel=_FIT,
    ),
]
KvTypeOption = Annotated[
    KvTypeName | None,
    typer.Option(
        "--kv-type", help="With --fit: type of the KV cache; default: f16.", show_default=False, rich_help_panel=_FIT
    ),
]
ImageTokens = Annotated[
    int | None,
    typer.Option(
        help="With --fit: tokens of the largest picture; default: llama.cpp's limit.",
        min=1,
        show_default=False,
        rich_help_panel=_FIT,
    ),
]
Reserve = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With --fit: memory left to the driver, its libraries and the screen; default: 1GiB.",
        show_default=False,
        rich_help_panel=_FIT,
    ),
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
        help="mode: Fisher sensitivity, one budget (our default); paper: frequency times expert error, a budget per "
        "layer, as in arXiv 2606.17118; pmq: MC-MoE's. The options of signals change single parts of a preset."
    ),
]
_SIGNALS = "Signals (default: the preset's)"
MetricOption = Annotated[
    MetricName | None,
    typer.Option("--sensitivity", help="What damage is measured by.", show_default=False, rich_help_panel=_SIGNALS),
]
CombineOption = Annotated[
    CombinationName | None,
    typer.Option(
        "--combine",
        help="What an expert's cost is made of: sensitivity alone, its product with frequency, frequency times weight "
        "error, PMQ's, or random.",
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
ModalityWeights = Annotated[
    str | None,
    typer.Option(
        metavar="T,K,R",
        help="Weights of text, key vision and redundant vision tokens.",
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
AnswerWeights = Annotated[
    str | None,
    typer.Option(
        metavar="T,I",
        help="Weights of text and of image answers.",
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
Pooled = Annotated[
    bool | None,
    typer.Option(
        "--pooled/--per-modality",
        help="Frequencies count all weighted tokens alike, or each modality by itself.",
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
FrequencyFloor = Annotated[
    float | None,
    typer.Option(
        help="Least frequency of an expert, in parts of the layer's mean.",
        min=0.0,
        max=1.0,
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
ScopeOption = Annotated[
    ScopeName | None,
    typer.Option(
        "--budget-per",
        help="One budget for the model, or one of equal bits per layer's experts.",
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
Equality = Annotated[
    bool | None,
    typer.Option(
        "--use-all/--at-most",
        help="Use the budget to the last byte that sizes allow, or at most it.",
        show_default=False,
        rich_help_panel=_SIGNALS,
    ),
]
DenseOption = Annotated[
    DenseName | None,
    typer.Option(
        "--dense",
        help="Attention, embedding and output: measured and planned like experts, or all of one type.",
        show_default=False,
        rich_help_panel=_SIGNALS,
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
ROUNDING_HELP = (
    "nearest: every weight by itself; feedback: the errors of a row make up for each other (GPTQ), in as many bytes."
)
RoundingOption = Annotated[RoundingName, typer.Option(help=ROUNDING_HELP)]
EffortOption = Annotated[Effort, typer.Option(help="How long refined packing searches.")]
SizePower = Annotated[
    float,
    typer.Option(
        help="Refined packing weighs a weight's error with importance times this power of its size squared, "
        "0, 0.5, 1, ...; 0 is the importance alone."
    ),
]
UnitKlOption = Annotated[
    bool,
    typer.Option(
        "--unit-kl",
        help="Take whole tensors' costs from `mode-gguf unit-kl`, shared out over experts by the sensitivity.",
        rich_help_panel=_SIGNALS,
    ),
]
Refine = Annotated[
    int,
    typer.Option(
        help="Rounds in which the plan is measured together with its neighbours and improved; 0 for none.", min=0
    ),
]
MeasuredSamples = Annotated[
    int, typer.Option(help="Calibration samples that KL is measured on, half of them with an image.", min=1)
]
ExpertTypes = Annotated[str, typer.Option("--types", help="Candidate types of expert tensors, comma-separated.")]
DenseTypes = Annotated[str, typer.Option(help="Candidate types of attention, embedding and output tensors.")]
MeasuredExpertTypes = Annotated[
    str | None,
    typer.Option(
        "--types",
        help="Candidate types of expert tensors, comma-separated; default: those of `sensitivity`.",
        show_default=False,
    ),
]
MeasuredDenseTypes = Annotated[
    str | None,
    typer.Option(
        "--dense-types",
        help="Candidate types of attention, embedding and output tensors; default: those of `sensitivity`.",
        show_default=False,
    ),
]
Floors = Annotated[
    list[str] | None,
    typer.Option(
        "--floor",
        metavar="ROLE=TYPE",
        help="Offer tensors of ROLE (expert, dense, embedding, output) nothing below TYPE, such as output=Q6_K; may be "
        "repeated.",
        show_default=False,
    ),
]
ProjectorOption = Annotated[ProjectorType, typer.Option("--mmproj-type", help="Type of the projector's matrices.")]
ShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Write the text model as GGUF splits with at most SIZE of tensors each, such as 45GB; llama.cpp is given "
        "the first. Default: one file.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads that pack; default: all cores.", min=1)]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Memory for hidden states of the samples; further ones go to temporary files (in TMPDIR). "
        "Changes no result.",
    ),
]
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
        metavar="PATH",
        help="Held-out folder with text.jsonl and questions.jsonl, or one JSONL file of either, to validate on; "
        "default: a small built-in set.",
    ),
]

DEFAULT_MEMORY = "4GiB"
DEFAULT_KEY_RATIO = 0.2
DEFAULT_SIZE_POWER = 0.0
DEFAULT_EXPERT_TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K"
DEFAULT_GROUP_TYPES = "IQ2_XXS," + DEFAULT_EXPERT_TYPES
"""With a type per expert: rarely used ones in two bits leave room for others (docs/experiments/type-per-expert.md)."""
DEFAULT_DENSE_TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0"
DEFAULT_BPW = 3.0
DEFAULT_MEASURED_SAMPLES = 64


def candidate_types(expert: str, dense: str, floors: Sequence[str] = ()) -> "CandidateTypes":
    """Candidates from two comma-separated lists, and floors from `role=type` each.

    Raises:
        UsageError: a name is unknown, or a list is empty.
        MissingResourceError: libggml packs one of them, and cannot be used.
    """
    from mode_gguf.allocation.units import CandidateTypes
    from mode_gguf.quantization.libggml import check_available
    from mode_gguf.quantization.types import parse_types

    types = CandidateTypes(parse_types(expert), parse_types(dense), dict(map(_floor, floors)))
    check_available((*types.expert, *types.dense, *types.floors.values()))
    return types


def measured_types(
    folder: "WorkFolder", expert: str | None, dense: str | None, floors: Sequence[str] = ()
) -> "CandidateTypes":
    """`candidate_types`, where a list that is not given stands for what `sensitivity` measured in the folder.

    Raises:
        InputError: `sensitivity` has not run there.
    """
    from mode_gguf.importance.sensitivity_table import SensitivityTable

    if expert is None or dense is None:
        table = SensitivityTable.load(folder.sensitivity)
        expert, dense = expert or ",".join(table.expert_types), dense or ",".join(table.dense_types)
    return candidate_types(expert, dense, floors)


def _floor(text: str) -> "tuple[Role, QuantType]":
    """Role and type of `role=type`."""
    from mode_gguf.architectures.tensors import Role
    from mode_gguf.errors import UsageError
    from mode_gguf.quantization.types import quant_type

    role, separator, name = text.partition("=")
    roles = [known.value for known in Role if known is not Role.KEEP]
    if not separator or role not in roles:
        raise UsageError(f"--floor {text}: write a role ({', '.join(roles)}), = and a type, such as output=Q6_K")
    return Role(role), quant_type(name)


def budget_of(bpw: float | None, size: str | None, expert_bpw: float | None, fit: "Budget | None" = None) -> "Budget":
    """The budget from the four ways of giving one; the last is what `fit_of` makes.

    Raises:
        UsageError: more than one, or a value that is none.
    """
    from mode_gguf.allocation.budget import Budget, parse_size
    from mode_gguf.errors import UsageError

    ways = (("bpw", bpw), ("size", size), ("expert-bpw", expert_bpw), ("fit", fit))
    given = [f"--{name}" for name, value in ways if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different budgets: give one of them")
    for option, value in (("--bpw", bpw), ("--expert-bpw", expert_bpw)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{option} {value:g} is no number of bits: give a positive one, such as 3.0")
    if fit is not None:
        return fit
    if size is not None:
        return Budget(kind="size", value=parse_size(size))
    if expert_bpw is not None:
        return Budget(kind="expert-bpw", value=expert_bpw)
    return Budget(kind="bpw", value=DEFAULT_BPW if bpw is None else bpw)


def fit_of(
    fit: str | None,
    context: int | None,
    parallel: int | None,
    kv_type: KvTypeName | None,
    image_tokens: int | None,
    reserve: str | None,
    projector_type: ProjectorType,
) -> "Budget | None":
    """The budget that a GPU's memory is, if it is given.

    Raises:
        UsageError: no size, no context with it, or an option that means nothing without it.
    """
    from mode_gguf.allocation.budget import Budget, parse_size
    from mode_gguf.errors import UsageError
    from mode_gguf.gpu_memory.fit_settings import RESERVE, FitSettings

    if fit is None:
        others = {
            "--ctx": context,
            "--parallel": parallel,
            "--kv-type": kv_type,
            "--image-tokens": image_tokens,
            "--reserve": reserve,
        }
        for option, value in others.items():
            if value is not None:
                raise UsageError(f"{option} goes with --fit, the memory of the GPU, such as --fit 24GiB")
        return None
    if context is None:
        raise UsageError(f"--fit {fit} needs to know how long the context is: give --ctx, such as --ctx 32768")
    settings = FitSettings(
        context=context,
        parallel=parallel or 1,
        kv_type=kv_type.value if kv_type else "f16",
        image_tokens=image_tokens,
        reserve=RESERVE if reserve is None else parse_size(reserve, "--reserve"),
        projector_type=projector_type.value,
    )
    return Budget(kind="fit", value=parse_size(fit, "--fit"), fit=settings)


def shard_bytes_of(shard_size: str | None) -> int | None:
    """Bytes of `--shard-size`.

    Raises:
        UsageError: not a size.
    """
    from mode_gguf.allocation.budget import parse_size

    return None if shard_size is None else parse_size(shard_size, "--shard-size")


def memory_bytes_of(memory: str) -> int:
    """Bytes of `--memory`.

    Raises:
        UsageError: not a size.
    """
    from mode_gguf.allocation.budget import parse_size

    return parse_size(memory, "--memory")


def preset_of(
    name: PresetName,
    sensitivity: MetricName | None = None,
    combine: CombinationName | None = None,
    modality_weights: str | None = None,
    answer_weights: str | None = None,
    pooled: bool | None = None,
    frequency_floor: float | None = None,
    budget_per: ScopeName | None = None,
    use_all: bool | None = None,
    dense: DenseName | None = None,
    seed: int | None = None,
    unit_kl: bool = False,
) -> "Preset":
    """The named preset with the signals that the command line changes.

    Raises:
        UsageError: a list of weights is none, or signals that do not go together.
    """
    from mode_gguf.allocation.presets import PRESETS

    preset = PRESETS[name.value]
    costs: dict[str, Any] = {
        "combination": combine and combine.value,
        "modality_weights": modality_weights and _numbers("--modality-weights", modality_weights, 3),
        "answer_weights": answer_weights and _numbers("--answer-weights", answer_weights, 2),
        "pooled": pooled,
        "frequency_floor": frequency_floor,
        "seed": seed,
    }
    scope = budget_per.value if budget_per else None
    fixed = DenseName.FIXED.value if scope == "layer" and dense is None else None
    changes: dict[str, Any] = {
        "method": sensitivity and sensitivity.value,
        "scope": scope,
        "equality": use_all,
        "unit_kl": unit_kl,
        "dense": dense.value if dense else fixed,
        "costs": replace(preset.costs, **{key: value for key, value in costs.items() if value is not None}),
    }
    return replace(preset, **{key: value for key, value in changes.items() if value is not None})


def _numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """`count` comma-separated numbers."""
    from mode_gguf.errors import UsageError

    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise UsageError(f"{option} {text} is not {count} numbers with commas, such as {','.join(['1'] * count)}")
    return numbers


def packing_of(mode: PackingMode, effort: Effort, size_power: float) -> "Packing":
    """The library's packing from the command line's.

    Raises:
        UsageError: the power is none that is supported.
    """
    from mode_gguf.quantization.packing import Packing

    return Packing(mode.value, effort.value, size_power)


def base_of(
    base_gguf: Path | None, base_mmproj: Path | None, model: str | None, calibration_from: Path | None
) -> "Base | None":
    """The files of a base GGUF, if one is given; where no model is run, its weights are not compared with it.

    Raises:
        UsageError: a projector without its text model, or neither a model nor what stands for it.
    """
    from mode_gguf.errors import UsageError
    from mode_gguf.pipeline import Base

    if base_gguf is None and base_mmproj is not None:
        raise UsageError("--base-mmproj goes with --base-gguf, the text model's file")
    if model is None and (base_gguf is None or calibration_from is None):
        raise UsageError("MODEL is missing: only --base-gguf together with --calibration-from can do without it")
    return None if base_gguf is None else Base(base_gguf, base_mmproj, compared=calibration_from is None)


def calibration_options(
    source: str | None,
    image_samples: int,
    text_samples: int,
    device: Device,
    seed: int,
    memory: str,
    *,
    key_ratio: float = DEFAULT_KEY_RATIO,
    key_tokens: KeyTokensName = KeyTokensName.TEXT_ATTENTION,
    from_imatrix: Path | None = None,
) -> "CalibrationOptions":
    """The pipeline's calibration options from the command line's."""
    from mode_gguf.pipeline import CalibrationOptions

    return CalibrationOptions(
        source,
        image_samples,
        text_samples,
        key_ratio,
        key_tokens.value,
        device.value,
        seed,
        memory_bytes_of(memory),
        from_imatrix,
    )
