"""The record of a conversion, apart from its validation: the part `conversion` of report.json.

report.html shows these numbers and those of the validation, and no others. A part whose artefact is not there is
None, and `missing` says why.
"""

from mode_gguf.artifacts import Record


class SizePoint(Record):
    """A text model of some size, written or hypothetical.

    Attributes:
        name: what it is, such as `Q3_K` for all experts in that type.
        size_bytes: of all tensors.
        predicted: damage, a number for each of `Prediction.answers`; None where nothing that was measured says so.
    """

    name: str
    size_bytes: int
    bpw: float
    predicted: tuple[float, ...] | None = None


class TensorTypes(Record):
    """The types of one tensor: how many of its matrices (experts; 1 of any other tensor) are stored in each.

    `part` is the name within its layer, such as `attn_q` or `ffn_up_exps`; `layer` is None outside of all.
    """

    layer: int | None
    part: str
    n_weights: int
    types: dict[str, int]


class PlanRecord(Record):
    """The recipe of the file.

    Attributes:
        size_bytes, bpw: of all tensors; `experts_bpw` of the routed experts alone.
        full_precision_bytes: of all tensors in the 16 bits of a checkpoint.
        granularity: whether a tensor or an expert has one type.
        gap: how far from the optimum the solver proved the plan to be at most, relative to its cost.
    """

    preset: str
    budget: str | None
    granularity: str
    size_bytes: int
    bpw: float
    experts_bpw: float
    full_precision_bytes: int
    n_weights: int
    packing: str
    rounding: str
    imatrix: str
    gap: float | None
    types: list[TensorTypes]


class Prediction(Record):
    """Damage predicted from sensitivity.

    Attributes:
        answers: `text` and `image`, then numbers are KL in nats per token; or `cost` alone, of no unit.
        this: of the file as planned.
        planned: the least damage at other sizes, smallest first, with a type per tensor.
    """

    sensitivity: str
    answers: tuple[str, ...]
    this: tuple[float, ...] | None
    planned: list[SizePoint]


class Unit(Record):
    """A tensor, or an expert of a layer (`blk.3.expert.17`), and what its type costs; costs as the plan weighed them.

    `types` are those its weights have; `smallest` is the smallest it could have had, `smallest_cost` what that would
    cost.
    """

    name: str
    types: str
    cost: float | None
    smallest: str
    smallest_cost: float


class SensitivityRecord(Record):
    """Sensitivity of tensors and experts.

    Attributes:
        method, positions: scored positions by kind of answer.
        tensors, experts: the most sensitive ones, by the cost of their smallest type.
        layers: of the rows of `by_expert`.
        by_expert: cost of every expert in its smallest type, layer by expert.
    """

    method: str
    positions: tuple[int, ...]
    tensors: list[Unit]
    experts: list[Unit]
    layers: list[int]
    by_expert: list[list[float]]


class Routing(Record):
    """Routing of one modality's tokens to experts.

    Attributes:
        tokens: routed to every expert, layer by expert; a token counts once for each of its top-k experts.
        never_routed: experts that got none, over all layers; all of them where the modality had no token.
        likeness_to_text: mean over layers of the cosine between this modality's and text's tokens per expert.
    """

    modality: str
    tokens: list[list[int]]
    never_routed: int
    likeness_to_text: float | None


class CalibrationRecord(Record):
    """Calibration data, and the experts that it reached.

    `hardly_seen`: experts with fewer than `hardly_seen_below` text and key vision tokens.
    """

    datasets: tuple[str, ...]
    text_samples: int
    image_samples: int
    text_tokens: int
    vision_tokens: int
    key_tokens: str
    layers: list[int]
    n_experts: int
    routing: list[Routing]
    hardly_seen: int
    hardly_seen_below: int
    warnings: tuple[str, ...]


class StageRun(Record):
    """The last run of a stage: seconds, end (ISO 8601), and the command that it was part of, if known."""

    name: str
    seconds: float
    finished: str
    command: str | None = None


class ConversionRecord(Record):
    """Everything that report.html shows beside the validation.

    Attributes:
        stages: in their order, without `validate`, whose report has its times.
        versions: of what computed, by name; of the last stage that recorded them.
        uniform: files that store every expert in one type, and everything else in it, too, but not below Q4_K.
        missing: by part, why it is None or empty, in a sentence.
    """

    model: str
    plan: PlanRecord | None
    uniform: list[SizePoint]
    prediction: Prediction | None
    sensitivity: SensitivityRecord | None
    calibration: CalibrationRecord | None
    stages: list[StageRun]
    versions: dict[str, str]
    missing: dict[str, str]


PARTS = ("plan", "prediction", "sensitivity", "calibration", "stages")


def unknown_conversion(model: str, reason: str) -> ConversionRecord:
    """The record of a file whose work folder is not there."""
    return ConversionRecord(
        model=model,
        plan=None,
        uniform=[],
        prediction=None,
        sensitivity=None,
        calibration=None,
        stages=[],
        versions={},
        missing=dict.fromkeys(PARTS, reason),
    )
