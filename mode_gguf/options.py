"""The options of every stage: the one place where an option's default, type, range and help stand.

Command lines (`mode_gguf_cli.generated`), recipe files (`mode_gguf.recipe`) and the documentation are made from these
classes. A field's docstring is its help. A field with a `Flag` is an option of its stage's command, and with
`everyday` one of `convert`, too; all fields can be set in a recipe.
"""

from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from mode_gguf.errors import UsageError
from mode_gguf.sizes import EXPECTED, parse_size
from mode_gguf.vocabulary import (
    BudgetScope,
    Combination,
    DenseRule,
    Device,
    Effort,
    Granularity,
    ImatrixKind,
    KeyTokenRule,
    KvType,
    Method,
    MtpType,
    PackingMode,
    ProjectorType,
    Rounding,
    ScoredAnswers,
    SplitMode,
    Tool,
)

STRICT: Final = ConfigDict(extra="forbid", use_attribute_docstrings=True)

BUDGET: Final = "Budget: how large the file may be; give one, default --bpw 3.0"
OUTPUT: Final = "Output: what is written, and where"
CALIBRATION: Final = "Calibration: what the model is run on, where your use is special"
COMPUTE: Final = "Hardware: when the first GPU or all memory is not what you want"
VALIDATION: Final = "Validation: how the result is checked in llama.cpp"
LIMITS: Final = "Limits: for pipelines; exit code 5 where one is broken"
PLACEMENT: Final = "Placement: when validating on GPUs; names are llama.cpp's"
MEASURING: Final = "Measuring: for experiments"
CANDIDATES: Final = "Candidate types: when the defaults are too many or too few"
SERVING: Final = "Serving: where llama-server listens"
PUBLISHING: Final = "Publishing: what is sent, and to whom it is shown"
BASE: Final = "Other models: start from llama.cpp's own conversion"
RECIPE: Final = "Recipe: everything else; `mode-gguf recipe` prints all options"
RUN: Final = "Run: how the command behaves"
PANELS: Final = (
    *(BUDGET, OUTPUT, CALIBRATION, COMPUTE, VALIDATION, LIMITS, PLACEMENT, MEASURING, CANDIDATES),
    *(SERVING, PUBLISHING, BASE, RECIPE, RUN),
)
"""Groups of options in the order in which help shows them."""


@plain_dataclass(frozen=True, slots=True)
class Flag:
    """An option of the command line that sets a field.

    Attributes:
        panel: the group that help shows it in.
        name: as it is typed; None for the field's name with hyphens.
        metavar: what help calls its value; None for the type's name.
        everyday: whether `convert` has it, beside the stage's own command.
        short: a second, short name.
    """

    panel: str
    name: str | None = None
    metavar: str | None = None
    everyday: bool = False
    short: str | None = None


def _size(value: Any) -> Any:
    """Bytes; a size in words is read."""
    if isinstance(value, bool):
        raise ValueError(EXPECTED)
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError:
        raise ValueError(EXPECTED) from None


def _half_steps(value: float) -> float:
    if 2 * value % 1:
        raise ValueError("0, 0.5, 1, ... 4 expected")
    return value


def _names(value: Any) -> Any:
    """A list that may be written with commas."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    """A list of numbers that may be written with commas; a single number is a list of one."""
    if isinstance(value, int | float):
        return (value,)
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ValueError("numbers such as 3,1 expected") from None


def _some_names(value: tuple[str, ...]) -> tuple[str, ...]:
    """Names without repetitions, of which there must be some, and none empty."""
    if not value or not all(value):
        raise ValueError("names with commas between them expected, such as Q2_K,Q4_K")
    return tuple(dict.fromkeys(value))


Size: TypeAlias = Annotated[int, Field(gt=0), BeforeValidator(_size)]
"""Bytes, also written as 12GiB (2^30 bytes each) or 800MB (10^6)."""
Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""Names, also written with commas."""
SomeNames: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_some_names)]
"""Names, at least one."""
_Weights2: TypeAlias = Annotated[tuple[float, float], BeforeValidator(_numbers)]
_Weights3: TypeAlias = Annotated[tuple[float, float, float], BeforeValidator(_numbers)]
_Shares: TypeAlias = Annotated[tuple[float, ...], BeforeValidator(_numbers)]

DEFAULT_EXPERT_TYPES: Final = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
DEFAULT_DENSE_TYPES: Final = (*DEFAULT_EXPERT_TYPES, "Q8_0")
GROUP_EXPERT_TYPES: Final = ("IQ2_XXS", *DEFAULT_EXPERT_TYPES)
"""Candidates with a type per expert: rarely used ones in two bits leave room for the others (docs/experiments)."""


def _existing(source: Any) -> Any:
    """A source that is a file or folder here, as a path that is right from any other folder, too."""
    return str(Path(source).absolute()) if isinstance(source, str | Path) and Path(source).exists() else source


@dataclass(frozen=True, config=STRICT)
class CheckpointOptions:
    """Options for opening the checkpoint."""

    base_gguf: Annotated[Path | None, BeforeValidator(_existing), Flag(BASE, metavar="FILE", everyday=True)] = None
    """Take names, metadata and tensors of the text model from a GGUF in full precision that llama.cpp's converter made
    of MODEL, the first shard of a split one."""
    base_mmproj: Annotated[Path | None, BeforeValidator(_existing), Flag(BASE, metavar="FILE", everyday=True)] = None
    """The projector that goes with --base-gguf."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer, for a tokenizer that is not recognised."""


@dataclass(frozen=True, config=STRICT)
class CalibrationOptions:
    """Calibration samples, and the choice of key vision tokens."""

    source: Annotated[
        str | None,
        BeforeValidator(_existing),
        Flag(CALIBRATION, "--calibration", metavar="PATH|DATASET", everyday=True),
    ] = None
    """Samples: a folder or file of chats in JSON (ShareGPT4V, OpenAI, Hugging Face), text files, or the name of a data
    set on the hub; default: a built-in set of photos, charts, documents, prose, code and several languages."""
    from_imatrix: Annotated[
        Path | None,
        BeforeValidator(_existing),
        Flag(CALIBRATION, "--calibration-from", metavar="IMATRIX", everyday=True),
    ] = None
    """Take statistics from llama-imatrix's GGUF file instead of running the model: needs no torch, and does not tell
    text from images."""
    image_samples: Annotated[int, Field(ge=0, le=1_000_000), Flag(CALIBRATION, everyday=True)] = 128
    """Samples with an image to use at most."""
    text_samples: Annotated[int, Field(ge=0, le=1_000_000), Flag(CALIBRATION, everyday=True)] = 128
    """Text samples to use at most."""
    key_tokens: KeyTokenRule = "text-attention"
    """Rule that chooses an image's key vision tokens. text-attention: those the text looks at (the paper's choice);
    received-attention: those that all later tokens look at; max-min-diversity: those that differ most; for comparison:
    all, redundant (those the text looks at least), random."""
    key_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of an image's tokens that are key vision tokens."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seed of everything drawn at random."""


@dataclass(frozen=True, config=STRICT)
class ComputeOptions:
    """Device, threads and memory."""

    device: Annotated[Device, Flag(COMPUTE, everyday=True)] = "auto"
    """Device that torch computes on."""
    threads: Annotated[int | None, Field(ge=1, le=4096), Flag(COMPUTE, everyday=True)] = None
    """Threads that pack; default: all cores."""
    hidden_memory: Annotated[Size, Flag(COMPUTE, metavar="SIZE", everyday=True)] = 4 << 30
    """Memory for hidden states of the samples; further ones go to temporary files (in TMPDIR). Changes no result."""


@dataclass(frozen=True, slots=True, config=STRICT)
class Packing:
    """Packing of the types that leave a choice. Searching is for K-quants; libggml's types are scaled at most."""

    mode: Annotated[PackingMode, Flag(MEASURING, "--packing")] = "refined"
    """Packing of K-quants. refined: with less error; exact: byte for byte as llama-quantize would."""
    effort: Annotated[Effort, Flag(MEASURING)] = "default"
    """Search effort of refined packing."""
    size_power: Annotated[float, Field(ge=0, le=4), AfterValidator(_half_steps)] = 0.0
    """Refined packing counts a weight's squared error importance * (variance + x^2) ^ size_power, with x the weight and
    variance the mean square of its super-block: 0, 0.5, 1, ...; 0 is the importance alone."""
    unbiased: bool = True
    """Whether refined packing scales super-blocks so that outputs keep their size."""

    @property
    def is_unbiased(self) -> bool:
        """Whether what is packed is scaled so that outputs keep their size."""
        return self.mode == "refined" and self.unbiased

    @property
    def default_rounding(self) -> Rounding:
        """Rounding with feedback, unless the bytes are to be libggml's."""
        return "feedback" if self.mode == "refined" else "nearest"


@dataclass(frozen=True, config=STRICT)
class SensitivityOptions:
    """Measure of quantization damage, and packing of the candidates."""

    method: Annotated[Method, Flag(MEASURING)] = "fisher"
    """Measure of the damage that quantization does."""
    imatrix: Annotated[ImatrixKind | None, Flag(MEASURING)] = None
    """Importance of a matrix's columns in packing. plain: mean squares of its inputs; fisher: those weighed by
    gradients; default: fisher where there are gradients."""
    types: Annotated[SomeNames | None, Flag(CANDIDATES, metavar="TYPE,TYPE")] = None
    """Candidate types of expert tensors; default: Q2_K to Q6_K, with granularity expert IQ2_XXS, too, or what was
    measured in the work folder if that is more."""
    dense_types: Annotated[SomeNames | None, Flag(CANDIDATES, metavar="TYPE,TYPE")] = None
    """Candidate types of attention, embedding and output; default: Q2_K to Q6_K and Q8_0."""
    packing: Packing = Packing()
    """Packing of the candidates, and then of the file."""
    measured_samples: Annotated[int, Field(ge=1), Flag(MEASURING)] = 64
    """Calibration samples that KL is measured on where it is measured (`unit-kl`, refine), half of them with an
    image."""


@dataclass(frozen=True, config=STRICT)
class FitOptions:
    """Inference settings that decide what a text model shares a GPU's memory with."""

    context: Annotated[int | None, Field(gt=0, le=1 << 24), Flag(BUDGET, "--ctx", everyday=True)] = None
    """With --fit: tokens of context, of all parallel sequences together (llama-server's -c)."""
    parallel: Annotated[int, Field(gt=0, le=256), Flag(BUDGET)] = 1
    """With --fit: sequences answered at the same time, which share the context."""
    kv_type: Annotated[KvType, Flag(BUDGET, everyday=True)] = "f16"
    """With --fit: type of the KV cache."""
    image_tokens: Annotated[int | None, Field(gt=0), Flag(BUDGET)] = None
    """With --fit: tokens of the largest picture; default: llama.cpp's limit."""
    reserve: Annotated[Size, Flag(BUDGET, metavar="SIZE")] = 1 << 30
    """With --fit: memory left to the driver, its libraries and the screen; also the margin that llama-server wants to
    see free before it moves parts of a model off the GPU."""


@dataclass(frozen=True, config=STRICT)
class BudgetOptions:
    """Size budget of the text model: one of four."""

    bpw: Annotated[float | None, Field(gt=0, allow_inf_nan=False), Flag(BUDGET, everyday=True)] = None
    """Bits per weight of the whole text model, all its tensor bits over all its weights."""
    size: Annotated[Size | None, Flag(BUDGET, metavar="SIZE", everyday=True)] = None
    """Size of the text model's file, such as 12GB (10^9 bytes each) or 12GiB (2^30)."""
    expert_bpw: Annotated[float | None, Field(gt=0, allow_inf_nan=False), Flag(BUDGET)] = None
    """Bits per weight of the routed experts; everything else takes the largest of its candidates."""
    fit: Annotated[Size | None, Flag(BUDGET, metavar="SIZE", everyday=True)] = None
    """The memory of the GPU that the model is going to run on, such as 24GiB; the text model gets what KV cache,
    projector, compute buffers and the reserve leave of it."""
    gpu: FitOptions = FitOptions()
    """Inference settings that share that memory."""


@dataclass(frozen=True, config=STRICT)
class CostOptions:
    """Weights and formula that make costs of a sensitivity table."""

    combination: Combination = "sensitivity"
    """Formula of an expert's cost: sensitivity alone, its product with frequency (the paper's), frequency times
    weight error, PMQ's, or random."""
    answer_weights: _Weights2 = (1.0, 1.0)
    """Importance of text answers and of image answers; none negative, one positive."""
    modality_weights: _Weights3 = (1.0, 1.0, 1.0)
    """Importance of text, key vision and redundant vision tokens."""
    pooled: bool = False
    """Whether frequencies count all tokens of weighted modalities alike instead of each modality by itself."""
    frequency_floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least frequency of an expert, in parts of the layer's mean; 0 for none."""


@dataclass(frozen=True, config=STRICT)
class PlanOptions:
    """Budget, candidates and costs of the plan."""

    budget: BudgetOptions = BudgetOptions()
    """Size budget of the text model."""
    granularity: Annotated[Granularity, Flag(OUTPUT, everyday=True)] = "tensor"
    """tensor: a type per tensor, as stock llama.cpp loads it; expert: a type per expert, for which `mode-gguf runtime
    build` makes a llama.cpp."""
    rounding: Annotated[Rounding | None, Flag(OUTPUT, everyday=True)] = None
    """nearest: every weight by itself; feedback: the errors of a row make up for each other (GPTQ), in as many bytes.
    Default: feedback, unless packing is exact."""
    uniform: Annotated[str | None, Flag(CANDIDATES, metavar="TYPE")] = None
    """Ignore sensitivity and budget: every expert in TYPE, the rest in TYPE but not below Q4_K."""
    floors: Annotated[
        dict[str, str], Field(examples=[{"output": "Q6_K"}]), Flag(CANDIDATES, "--floor", metavar="ROLE=TYPE")
    ] = Field(default_factory=dict)
    """Offer tensors of a role (expert, dense, embedding, output) nothing below a type."""
    costs: CostOptions = CostOptions()
    """Costs of the integer programme."""
    scope: BudgetScope = "model"
    """One budget for the model, or one of equal bits per layer's experts."""
    dense: DenseRule | None = None
    """Attention, embedding and output: measured and planned like experts, or fixed: all of one type. Default: measured,
    and fixed where every layer has its own budget."""
    use_all: bool = False
    """Whether the budget is used to the last byte that sizes allow, as in the paper."""
    unit_kl: bool = False
    """Whether whole tensors' costs are those that `mode-gguf unit-kl` measures, shared out over experts by the
    sensitivity."""
    refine: Annotated[int, Field(ge=0, le=1000), Flag(MEASURING)] = 0
    """Rounds in which the plan is measured together with its neighbours and improved; 0 for none."""


@dataclass(frozen=True, config=STRICT)
class ExportOptions:
    """Types and splits of the files."""

    mmproj_type: Annotated[ProjectorType, Flag(OUTPUT, everyday=True)] = "F16"
    """Type of the projector's matrices."""
    shard_size: Annotated[Size | None, Flag(OUTPUT, metavar="SIZE", everyday=True)] = None
    """Write the text model as GGUF splits with at most SIZE of tensors each, such as 45GB; llama.cpp is given the
    first. Default: one file."""
    mtp: Annotated[MtpType | None, Flag(OUTPUT, metavar="TYPE")] = None
    """Write the block for multi-token prediction, too, with matrices of this type, such as Q8_0."""


@dataclass(frozen=True, slots=True, config=STRICT)
class Limits:
    """Limits that a file must keep; null asks nothing.

    KL in nats per token, shares between 0 and 1; `image` means answers about pictures. Where a server left something
    of the KL divergence unknown, what it may be at most must keep the limit.
    """

    max_kl: Annotated[float | None, Field(ge=0), Flag(LIMITS)] = None
    """Mean KL of text, nats per token."""
    max_kl_p99: Annotated[float | None, Field(ge=0), Flag(LIMITS)] = None
    """Its 99th percentile."""
    max_kl_p99_9: Annotated[float | None, Field(ge=0), Flag(LIMITS)] = None
    """Its 99.9th percentile."""
    min_top1: Annotated[float | None, Field(ge=0, le=1), Flag(LIMITS)] = None
    """Share of text tokens where both models would pick the same."""
    max_image_kl: Annotated[float | None, Field(ge=0), Flag(LIMITS)] = None
    """Mean KL of answers about pictures."""
    max_image_kl_p99: Annotated[float | None, Field(ge=0), Flag(LIMITS)] = None
    """Its 99th percentile."""
    max_image_kl_p99_9: Annotated[float | None, Field(ge=0), Flag(LIMITS)] = None
    """Its 99.9th percentile."""
    min_image_top1: Annotated[float | None, Field(ge=0, le=1), Flag(LIMITS)] = None
    """Share of their tokens where both would pick the same."""
    min_accuracy: Annotated[float | None, Field(ge=0, le=1), Flag(LIMITS)] = None
    """Share of right answers."""


@dataclass(frozen=True, config=STRICT)
class PlacementOptions:
    """Placement of a model in llama.cpp; everything else than the default needs one with a GPU backend."""

    n_gpu_layers: Annotated[int, Field(ge=-1), Flag(PLACEMENT, short="-ngl")] = 0
    """Layers in GPU memory; -1 means all."""
    split_mode: Annotated[SplitMode, Flag(PLACEMENT)] = "layer"
    """Split of the model over several GPUs."""
    main_gpu: Annotated[int, Field(ge=0), Flag(PLACEMENT)] = 0
    """The GPU of split mode none, or for results of row."""
    tensor_split: Annotated[_Shares, Flag(PLACEMENT, metavar="N,N")] = ()
    """Share of each GPU, such as 3,1; default: llama.cpp's choice."""
    devices: Annotated[Names, Flag(PLACEMENT, "--device", metavar="NAME,NAME")] = ()
    """Devices to use, such as CUDA0; default: all GPUs."""
    override_tensors: Annotated[Names, Flag(PLACEMENT, "--override-tensor", metavar="REGEX=BUFFER")] = ()
    """Buffers for tensors of matching names, such as exps=CPU; the first that matches decides."""
    kv_offload: Annotated[bool, Flag(PLACEMENT)] = True
    """Whether the KV cache is where its layers are."""
    mmproj_offload: Annotated[bool, Flag(PLACEMENT)] = True
    """Whether the projector is on the GPU, if layers are."""


@dataclass(frozen=True, config=STRICT)
class ValidationOptions:
    """Comparison of a file with its reference."""

    validate: Annotated[bool, Flag(VALIDATION, everyday=True)] = True
    """Compare the result with a BF16 file of the same model in llama.cpp; writes that file too."""
    samples: Annotated[Path | None, BeforeValidator(_existing), Flag(VALIDATION, metavar="PATH", everyday=True)] = None
    """Held-out folder with text.jsonl and questions.jsonl, or one JSONL file of either, to validate on; default: a
    small built-in set."""
    allow_outside_samples: Annotated[bool, Flag(VALIDATION)] = False
    """Read files that --samples names outside its folder; its pictures are shown in the report."""
    llama_cpp: Annotated[Path | None, BeforeValidator(_existing), Flag(VALIDATION, metavar="FOLDER", everyday=True)] = (
        None
    )
    """Folder of your llama.cpp tools; default: MODE_GGUF_LLAMA_CPP, then PATH, then the embedded build."""
    answers: Annotated[ScoredAnswers, Flag(VALIDATION)] = "reference"
    """Answers about pictures that KL is measured on: the reference's own greedy ones, or the right ones that questions
    come with."""
    context: Annotated[int, Field(ge=16), Flag(VALIDATION)] = 4096
    """Tokens that a prompt and its answer may take."""
    text_tokens: Annotated[int, Field(ge=2), Flag(VALIDATION)] = 256
    """Tokens of each text that are used at most."""
    answer_tokens: Annotated[int, Field(ge=1), Flag(VALIDATION)] = 64
    """Tokens of an answer at most."""
    library: Annotated[Path | None, BeforeValidator(_existing), Flag(VALIDATION, metavar="FOLDER")] = None
    """A llama.cpp built with shared libraries to measure in; default: the one in xllamacpp."""
    top_logprobs: Annotated[int, Field(ge=0), Flag(VALIDATION)] = 4096
    """Tokens that a server lists per position; 0 is all of them, and makes KL exact."""
    limits: Limits = Limits()
    """Limits that the file must keep."""
    placement: PlacementOptions = PlacementOptions()
    """Placement of a model in llama.cpp."""


@dataclass(frozen=True, config=STRICT)
class PublishingOptions:
    """Publishing on the hub."""

    yes: Annotated[bool, Flag(PUBLISHING)] = False
    """Upload. Without it, what would be uploaded is shown and nothing is sent."""
    card_only: Annotated[bool, Flag(PUBLISHING)] = False
    """Write README.md, the model card, into FOLDER; send nothing."""
    replace_card: Annotated[bool, Flag(PUBLISHING)] = False
    """With --card-only: replace a README.md that was edited, or comes from elsewhere."""
    private: Annotated[bool | None, Flag(PUBLISHING, "--private/--public")] = None
    """Visibility of the repository; default: a new one is private, another one stays as it is."""
    unvalidated: Annotated[bool, Flag(PUBLISHING)] = False
    """Publish files that were not validated as they are now."""
    base_model: Annotated[str | None, Flag(PUBLISHING, metavar="ORG/NAME")] = None
    """The original model on the hub, where it was converted from a folder that does not say."""


@dataclass(frozen=True, config=STRICT)
class ServingOptions:
    """Serving of a finished model."""

    tool: Annotated[Tool, Flag(SERVING)] = "llama-server"
    """The program to start."""
    host: Annotated[str, Flag(SERVING)] = "127.0.0.1"
    """Address that llama-server listens on."""
    port: Annotated[int, Field(ge=0, le=65535), Flag(SERVING)] = 8080
    """Its port; 0 for any that is free."""
    context: Annotated[int | None, Field(ge=1), Flag(SERVING, "--ctx")] = None
    """Its context in tokens; default: what the model was fitted for, else 16384 at most."""
    llama_cpp: Annotated[Path | None, Flag(SERVING, metavar="FOLDER")] = None
    """Folder of your llama.cpp tools; default: MODE_GGUF_LLAMA_CPP, then PATH, then the embedded build."""
    verbose: Annotated[bool, Flag(SERVING)] = False
    """Show what llama-server says."""
