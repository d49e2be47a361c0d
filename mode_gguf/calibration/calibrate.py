"""The calibration stage: samples through the model, layer by layer; statistics per expert and modality out."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add

import torch

from mode_gguf.calibration.observers import Observer, unobserved_activations
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.denormals import denormals_flushed
from mode_gguf.forward.distributed import gathered, share_of, sum_over_ranks
from mode_gguf.forward.hidden_store import HiddenStore
from mode_gguf.forward.hooks import LayerRecorder, SampleTrace, recording
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.forward.layerwise import run_layerwise
from mode_gguf.forward.limits import HIDDEN_BYTES, MAX_IMAGE_PIXELS, MAX_TOKENS
from mode_gguf.forward.modality import TEXT_ATTENTION, KeyTokens
from mode_gguf.forward.offload import TensorOffload
from mode_gguf.forward.streaming import StreamedModel, open_streamed
from mode_gguf.progress import Progress, silent


@denormals_flushed()
def calibrate(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    device: str = "auto",
    key_tokens: KeyTokens = TEXT_ATTENTION,
    max_tokens: int = MAX_TOKENS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    hidden_bytes: int = HIDDEN_BYTES,
    progress: Progress = silent,
) -> CalibrationStatistics:
    """Statistics of `samples`; one decoder layer's weights are in memory at a time.

    Called by several processes together, each runs its share of the samples; all return the statistics of all.

    Args:
        device: `auto`, `cpu` (float32) or `cuda` (bfloat16).
        key_tokens: how key vision tokens are chosen.
        max_tokens: text tokens per sample; longer texts and answers are cut.
        max_image_pixels: images are scaled down to this area.
        hidden_bytes: memory for hidden states of samples that wait; further ones go to temporary files.

    Raises:
        UsageError: no samples, fewer of them than processes, or an unknown device.
        InputError: model or sample cannot be used, or an activation was never seen.
    """
    if not samples:
        raise UsageError("calibration needs at least one sample")
    builder = InputBuilder.open(checkpoint, max_tokens=max_tokens, max_image_pixels=max_image_pixels)
    inputs = [builder.build(sample) for sample in share_of(samples)]
    streamed = open_streamed(checkpoint, device)
    observer = Observer(streamed.tensors, streamed.device)
    run_recorded(
        streamed,
        inputs,
        key_tokens=key_tokens,
        leave=observer.observe,
        finish=lambda layer: observer.finish_layer(),
        hidden_bytes=hidden_bytes,
        description="calibrating",
        progress=progress,
    )
    arrays = sum_over_ranks(observer.arrays)
    unseen = unobserved_activations(arrays, streamed.tensors)
    if unseen:
        raise InputError(f"{checkpoint.path}: calibration saw nothing of {', '.join(unseen)}")
    return CalibrationStatistics(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        arrays=arrays,
        samples=reduce(add, gathered(count_samples(inputs))),
        key_tokens=key_tokens,
        datasets=tuple(dict.fromkeys(sample.dataset for sample in samples)),
        has_vision=bool(streamed.family.projector_type),
    )


def run_recorded(
    streamed: StreamedModel,
    inputs: Sequence[ModelInputs],
    *,
    key_tokens: KeyTokens | None,
    leave: Callable[[SampleTrace, int], None],
    finish: Callable[[int], None],
    keep_hidden: bool = True,
    hidden_bytes: int = HIDDEN_BYTES,
    description: str,
    progress: Progress = silent,
) -> None:
    """All samples forward, layer by layer, with experts, linear layers and key tokens watched; without logits.

    Args:
        key_tokens: how they are chosen; None where nobody asks which vision tokens are key.
        leave: leave(pass, i) after a sample has left layer i (the last one includes the output head); it must take
            what it needs, the records are dropped afterwards.
        finish: finish(i) after all samples have left layer i, while its weights are still loaded.
        keep_hidden: whether the experts' gated activations are recorded.
        hidden_bytes: memory for hidden states of samples that wait; see `calibrate`.
    """
    passes = [SampleTrace.of(one, streamed.device) for one in inputs]
    watch = LayerRecorder(key_tokens, keep_hidden)

    def enter(number: int) -> None:
        watch.current = passes[number]

    def left(number: int, layer: int) -> None:
        leave(passes[number], layer)
        passes[number].forget()

    def free(layer: int) -> None:
        finish(layer)
        streamed.free_layer(layer)

    watched = recording(streamed.model, streamed.watched_linears(), watch)
    with HiddenStore(hidden_bytes) as store, watched, streamed.without_logits():
        run_layerwise(
            streamed.layers,
            [partial(_forward, streamed, one) for one in inputs],
            load=streamed.load_layer,
            free=free,
            enter=enter,
            leave=left,
            parking=TensorOffload(store, streamed.model, streamed.text_model),
            tokens=[len(one.input_ids) for one in inputs],
            description=description,
            progress=progress,
        )


def _forward(streamed: StreamedModel, inputs: ModelInputs) -> None:
    with torch.no_grad():
        streamed.model(**inputs.model_arguments(streamed.device, streamed.dtype))


def count_samples(inputs: Sequence[ModelInputs]) -> SampleCounts:
    """Samples and tokens of each kind."""
    n_image = sum(one.has_image for one in inputs)
    n_vision = sum(int(one.is_vision.sum()) for one in inputs)
    return SampleCounts(
        text_samples=len(inputs) - n_image,
        image_samples=n_image,
        text_tokens=sum(len(one.input_ids) for one in inputs) - n_vision,
        vision_tokens=n_vision,
    )
