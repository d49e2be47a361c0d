"""Estimates per stage, from shapes alone: memory, disk space and, from this machine's speed, time.

Memory is counted, not guessed: a decoder layer and what lies outside the layers in the type that torch computes in,
tensors of waiting samples up to `--hidden-memory`, and what the stage makes of the samples at one layer.
experiments/bench_scale.py puts it beside what was measured. Times are those of an idle machine, right within a factor
of two.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, cast

from gguf import Keys

from mode_gguf.architectures import find_family, projector_tensors, text_tensors
from mode_gguf.architectures.images import ImageSize, scaled_size
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.estimate.machine import Machine, fits_half_of_memory
from mode_gguf.forward.limits import LABEL_DRAWS, MAX_IMAGE_PIXELS, MAX_TOKENS
from mode_gguf.options import CalibrationOptions

if TYPE_CHECKING:
    from mode_gguf.data.sample import Sample

PROCESS_BYTES = 700 << 20
"""Python with torch, transformers and compiled kernels."""

CUDA_BYTES = 3 << 29
"""CUDA's context: bytes in each process, and again on its GPU."""

EXPORT_BYTES = 1 << 29
"""Memory of export for any model: matrices in the packing threads."""

VALIDATION_BYTES = 3 << 29
"""llama.cpp's caches and buffers; the files themselves are mapped."""

_HEAP_VALUES, _MOST_HEAP = 1, 4 << 30
"""Heap that the C library keeps after forwards: hidden states per token, as measured, and its limit in bytes."""

_MERGED_PATCHES = (Keys.ClipVision.SPATIAL_MERGE_SIZE, Keys.ClipVision.Projector.SCALE_FACTOR)
"""Metadata keys of a projector's merge factor: patches per side that one token stands for."""
_PATCH_SIZE = 16
"""Patch size in pixels of a projector that names none, or is not there."""
_CHARACTERS_PER_TOKEN = 3.0
_TEMPLATE_TOKENS = 24
_PACKED_PER_SECOND = 1.5e8
"""Weights that a core packs to nearest, reading them included."""
_FED_BACK_PER_SECOND = 1.7e6
"""Weights that a core rounds with feedback."""
_CALIBRATE, _SENSITIVITY, _ROUND, _VALIDATE = 1.1, 20.0, 1.5, 4.0
"""Time of a stage's passes over the samples, in large products of as many operations as one forward takes: small
products of single experts are slower, and sensitivity computes gradients and what every candidate changes. The first
was measured (docs/experiments/scale.md), the others are counted."""
_HELD_OUT_TOKENS = 4000
"""Tokens of the built-in held-out set, about, times two models."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Model sizes that estimates depend on: numbers of weights, and widths.

    Attributes:
        outside: weights outside the decoder layers, the image encoder's included.
        layer: weights of the largest decoder layer.
        dense: weights of its matrices that are not experts'.
        active: weights that a token passes, head included.
        image_tokens: of an image of some size, or at most; no image is larger than calibration lets through.
    """

    stored_bytes: int
    weights: int
    layers: int
    outside: int
    layer: int
    dense: int
    active: int
    vision: int
    hidden: int
    vocabulary: int
    experts: int
    used: int
    width: int
    pixels_per_token: int
    image_tokens: Callable[[ImageSize | None], int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelSizes":
        """The sizes of a checkpoint, from its headers and configuration."""
        tensors = text_tensors(checkpoint)
        by_layer: Counter[int] = Counter()
        for tensor in tensors:
            if tensor.layer is not None:
                by_layer[tensor.layer] += tensor.n_weights
        ((largest, _),) = by_layer.most_common(1)
        dense = [tensor for tensor in tensors if tensor.layer == largest and tensor.role is Role.DENSE]
        experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
        embedding = next(tensor for tensor in tensors if tensor.role is Role.EMBEDDING)
        weights = sum(tensor.n_weights for tensor in tensors)
        projected = sum(tensor.n_weights for tensor in projector_tensors(checkpoint)) if checkpoint.base else 0
        every = sum(prod(stored.shape) for stored in checkpoint.tensors.values()) or weights + projected
        family = find_family(checkpoint)
        used_key = Keys.LLM.EXPERT_USED_COUNT.format(arch=family.gguf_arch)
        used = cast(int, family.text_metadata(checkpoint)[used_key])
        vision = family.projector_metadata(checkpoint)
        merged = next((vision[key] for key in _MERGED_PATCHES if key in vision), 1)
        side = cast(int, vision.get(Keys.ClipVision.PATCH_SIZE, _PATCH_SIZE)) * cast(int, merged)
        idle = sum(tensor.n_weights * (1 - used / tensor.n_experts) for tensor in experts)
        return cls(
            stored_bytes=sum(stored.nbytes for stored in checkpoint.tensors.values()) or 2 * weights,
            weights=weights,
            layers=len(by_layer),
            outside=max(0, every - sum(by_layer.values())),
            layer=by_layer[largest],
            dense=sum(tensor.n_weights for tensor in dense),
            active=int(weights - idle),
            vision=projected if checkpoint.base else every - weights,
            hidden=embedding.row_width,
            vocabulary=embedding.shape[0],
            experts=max(tensor.n_experts for tensor in experts),
            used=used,
            width=min(tensor.row_width for tensor in experts if tensor.projection == "down"),
            pixels_per_token=side * side,
            image_tokens=partial(family.vision.image_tokens or partial(_by_area, side * side), checkpoint),
        )


def _by_area(pixels_per_token: int, checkpoint: Checkpoint, size: ImageSize | None) -> int:
    """Tokens of an image of `size`, or of the largest, each of which stands for as many pixels."""
    return (MAX_IMAGE_PIXELS if size is None else prod(size)) // pixels_per_token


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Samples to run the model on: how many tokens of text and of images, and the longest of them."""

    text_tokens: int
    vision_tokens: int
    longest: int

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.vision_tokens

    @classmethod
    def of(cls, samples: "Sequence[Sample]", sizes: ModelSizes) -> "TokenCounts":
        """Estimate from the samples' characters and areas."""
        text = vision = longest = 0
        for sample in samples:
            characters = len(sample.text or "") + sum(len(message.text) for message in sample.messages)
            of_text = min(MAX_TOKENS, round(characters / _CHARACTERS_PER_TOKEN)) + _TEMPLATE_TOKENS * (
                sample.text is None
            )
            area = MAX_IMAGE_PIXELS // max(1, len(sample.images))
            of_image = sum(sizes.image_tokens(scaled_size(image.size, area)) for image in sample.open_images())
            text, vision, longest = text + of_text, vision + of_image, max(longest, of_text + of_image)
        return cls(text, vision, longest)

    @classmethod
    def at_most(cls, options: CalibrationOptions, sizes: ModelSizes) -> "TokenCounts":
        """Upper bound: samples of the largest size that the options allow."""
        of_image = sizes.image_tokens(None)
        return cls(
            (options.image_samples + options.text_samples) * MAX_TOKENS,
            options.image_samples * of_image,
            MAX_TOKENS + (of_image if options.image_samples else 0),
        )


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """Resources of one stage.

    Attributes:
        memory: most bytes that its process fills; device_memory: on a GPU, 0 where there is none.
        temporary: bytes in TMPDIR; working: in the work folder, until the file is finished; written: that stay there.
        seconds: None where the machine's speed was not measured.
    """

    stage: str
    memory: int = 0
    device_memory: int = 0
    temporary: int = 0
    working: int = 0
    written: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Workload of a conversion: all of it that memory, disk space and time depend on.

    Attributes:
        model_bytes: of the text model's file.
        hidden_bytes: hidden states that are kept in memory.
        expert_types, dense_types: how many candidates are measured.
        without_model: whether statistics come from an importance matrix.
        feedback: whether the file is rounded with feedback.
    """

    counts: TokenCounts
    model_bytes: int
    hidden_bytes: int
    expert_types: int
    dense_types: int
    without_model: bool
    feedback: bool
    validate: bool


def stage_estimates(
    sizes: ModelSizes, workload: Workload, cores: int, machine: Machine | None = None
) -> list[StageEstimate]:
    """Estimates of all stages of a conversion, in their order.

    Args:
        machine: measured; None leaves times out and takes torch to compute on the CPU.
    """
    gpu = machine is not None and machine.device_memory is not None
    counts, kept, model_bytes = workload.counts, workload.hidden_bytes, workload.model_bytes
    value = 2 if gpu else 4
    model = value * (sizes.outside + sizes.layer)
    # Of a sample that waits: the layer's input and the embeddings; of an image besides: what the encoder gave, and
    # what DeepStack adds, each as the encoder's output and as it is passed on.
    waiting = value * sizes.hidden * (2 * counts.tokens + 8 * counts.vision_tokens)
    of_all_layers = value * sizes.hidden * (counts.tokens * sizes.layers + 8 * counts.vision_tokens)
    pixels = 4 * 6 * sizes.pixels_per_token * counts.vision_tokens
    step = value * counts.longest * sizes.used * 3 * (sizes.width + sizes.hidden)
    logits = 2 * value * counts.longest * sizes.vocabulary
    sums = 8 * 3 * sizes.layers * sizes.experts * (sizes.hidden + sizes.width)
    imatrix = 4 * sizes.layers * sizes.experts * (2 * sizes.hidden + sizes.width)
    routed = 2 * value * counts.tokens * sizes.hidden
    gradients = 4 * LABEL_DRAWS * counts.tokens * sizes.hidden
    n_dense_types = workload.dense_types
    of_head = 3 * 4 * sizes.vocabulary * sizes.hidden
    of_layer = 4 * n_dense_types * sizes.dense + (1 + LABEL_DRAWS) * routed + 2 * (step + logits)
    held = (min(waiting, kept), min(of_all_layers, kept))

    def measuring(stage: str, samples: int, at_layer: int, **disk: int) -> StageEstimate:
        here = PROCESS_BYTES + pixels + samples + min(_HEAP_VALUES * 4 * sizes.hidden * counts.tokens, _MOST_HEAP)
        if gpu:
            return StageEstimate(stage, here + CUDA_BYTES, model + at_layer + min(waiting, model), **disk)
        return StageEstimate(stage, here + model + at_layer, **disk)

    stages = (
        [
            StageEstimate("calibrate", EXPORT_BYTES + sums, written=sums + imatrix),
            StageEstimate("sensitivity", EXPORT_BYTES + imatrix),
        ]
        if workload.without_model
        else [
            measuring("calibrate", held[0] + 2 * sums, step, temporary=max(0, waiting - kept), written=sums + imatrix),
            measuring(
                "sensitivity",
                held[1] + gradients + 2 * imatrix,
                max(of_layer, of_head - value * sizes.layer),
                temporary=max(0, of_all_layers - kept),
                written=imatrix,
            ),
        ]
    )
    if workload.feedback:
        packed = model_bytes // max(sizes.layers, 1)
        stages.append(
            measuring(
                "round",
                held[0] + imatrix + packed,
                routed + step,
                temporary=max(0, waiting - kept),
                working=model_bytes,
            )
        )
    stages.append(StageEstimate("export", EXPORT_BYTES, written=model_bytes))
    stages.append(StageEstimate("projector", EXPORT_BYTES, written=2 * sizes.vision))
    if workload.validate:
        compared = fits_half_of_memory(2 * sizes.weights)
        stages.append(StageEstimate("validate", VALIDATION_BYTES, written=2 * sizes.weights * compared))
    if machine is None:
        return stages
    seconds = _seconds(sizes, workload, cores, machine)
    return [replace(stage, seconds=seconds[stage.stage]) for stage in stages]


def _seconds(sizes: ModelSizes, workload: Workload, cores: int, machine: Machine) -> dict[str, float]:
    """Time of every stage, by name."""
    counts = workload.counts
    forward = 2 * (sizes.active * counts.tokens + 4 * sizes.vision * counts.vision_tokens) / machine.flops
    head = 2 * sizes.vocabulary * sizes.hidden * counts.tokens / machine.flops
    read = sizes.stored_bytes / machine.read_rate
    packed = sizes.weights / (_PACKED_PER_SECOND * cores)
    return {
        "calibrate": _CALIBRATE * (forward - head) + read,
        "sensitivity": _SENSITIVITY * forward + 2 * read + workload.expert_types * packed,
        "round": _ROUND * (forward - head) + read + sizes.weights / (_FED_BACK_PER_SECOND * cores),
        "export": packed + read,
        "projector": 2 * sizes.vision / machine.read_rate,
        "validate": 2 * read + _VALIDATE * 2 * sizes.active * _HELD_OUT_TOKENS / machine.flops,
    }
