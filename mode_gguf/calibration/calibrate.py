"""The calibration stage: layer-by-layer forward of the samples; statistics per expert and modality."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial

import numpy as np
import torch

from mode_gguf.calibration.observers import Observer, unobserved_activations
from mode_gguf.calibration.probe_prompts import SCORED, Prompt, probe_prompts, probes_of
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.denormals import denormals_flushed
from mode_gguf.forward.distributed import gathered, global_index, share_of, sum_over_ranks
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.forward.modality import TEXT_ATTENTION, KeyTokens
from mode_gguf.forward.recorded_forward import LayerConsumer, PredictedInputs, run_recorded
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.options import ComputeOptions
from mode_gguf.probes import Probe, Probes
from mode_gguf.progress import Progress, silent


def calibrate(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    device: str = "auto",
    key_tokens: KeyTokens = TEXT_ATTENTION,
    hidden_bytes: int = ComputeOptions.hidden_memory,
    progress: Progress = silent,
) -> CalibrationStatistics:
    """Calibration statistics of `samples` alone; as `calibrate_and_probe`."""
    run = partial(calibrate_and_probe, device=device, key_tokens=key_tokens, hidden_bytes=hidden_bytes)
    return run(checkpoint, samples, progress=progress)[0]


@denormals_flushed()
def calibrate_and_probe(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    device: str = "auto",
    key_tokens: KeyTokens = TEXT_ATTENTION,
    hidden_bytes: int = ComputeOptions.hidden_memory,
    progress: Progress = silent,
) -> tuple[CalibrationStatistics, Probes]:
    """Calibration statistics of `samples`, and the checkpoint's probes, which count in none of them.

    One decoder layer's weights are in memory at a time. Called by several processes together, each runs its share of
    the samples, the first one the probes; all return the statistics of all, and the probes.

    Args:
        device: `auto`, `cpu` (float32) or `cuda` (bfloat16).
        key_tokens: how key vision tokens are chosen.
        hidden_bytes: memory for hidden states of suspended samples; further ones go to temporary files.

    Raises:
        UsageError: no samples, fewer of them than processes, or an unknown device.
        InputError: model or sample cannot be used, or an activation was never seen.
    """
    if not samples:
        raise UsageError("calibration needs at least one sample")
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(sample) for sample in share_of(samples)]
    prompts: list[Prompt] = []
    if global_index(0) == 0:
        # Of a model without a family a picture is asked for only where the samples have shown that it can be placed.
        with_picture = checkpoint.base is None or any(sample.has_image for sample in samples)
        prompts = list(probe_prompts(builder, with_picture=with_picture))
    found: dict[int, Probe] = {}
    streamed = open_streamed(checkpoint, device)
    observer = Observer(streamed.tensors, streamed.device)
    run_recorded(
        streamed,
        inputs,
        LayerConsumer(
            key_tokens=key_tokens,
            leave=observer.observe,
            finish=lambda layer: _check_finite(checkpoint, observer.finish_layer(), streamed.dtype),
        ),
        _predictions(prompts, found),
        hidden_bytes=hidden_bytes,
        description="calibrating",
        progress=progress,
    )
    arrays = sum_over_ranks(observer.arrays)
    unseen = unobserved_activations(arrays, streamed.tensors)
    if unseen:
        raise InputError(f"{checkpoint.path}: calibration saw nothing of {', '.join(unseen)}")
    statistics = CalibrationStatistics(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        arrays=arrays,
        samples=SampleCounts(*np.sum([astuple(one) for one in gathered(count_samples(inputs))], axis=0).tolist()),
        key_tokens=key_tokens,
        datasets=tuple(dict.fromkeys(sample.dataset for sample in samples)),
        has_vision=bool(streamed.family.projector_type),
    )
    probes, *_ = gathered([found[number] for number in sorted(found)])
    return statistics, probes_of(checkpoint, builder, streamed.dtype, probes)


@denormals_flushed()
def measure_probes(
    checkpoint: Checkpoint,
    *,
    with_picture: bool = True,
    device: str = "auto",
    hidden_bytes: int = ComputeOptions.hidden_memory,
    progress: Progress = silent,
) -> Probes:
    """The checkpoint's probes alone, in one process; arguments and errors as of `calibrate_and_probe`.

    Args:
        with_picture: whether a question about a picture is among them, if the model takes pictures.
    """
    builder = InputBuilder.open(checkpoint)
    prompts, found = list(probe_prompts(builder, with_picture=with_picture)), dict[int, Probe]()
    streamed = open_streamed(checkpoint, device)
    consumer = LayerConsumer(leave=lambda trace, layer: None, keep_hidden=False)
    predicted = _predictions(prompts, found)
    run_recorded(streamed, [], consumer, predicted, hidden_bytes=hidden_bytes, description="probing", progress=progress)
    return probes_of(checkpoint, builder, streamed.dtype, [found[number] for number in sorted(found)])


def _predictions(prompts: Sequence[Prompt], found: dict[int, Probe]) -> PredictedInputs:
    """Prompts to run along, whose probes are put into `found` by number."""
    return PredictedInputs(
        [prompt.inputs for prompt in prompts],
        SCORED,
        lambda number, logits: found.update({number: prompts[number].predicted(logits)}),
    )


def _check_finite(checkpoint: Checkpoint, sums: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
    """Refuse a model whose own forward leaves the range of its numbers: what it then says of importance is nothing.

    Raises:
        InputError: naming the first activation of the layer that is not finite.
    """
    for name, array in sums.items():
        if not np.isfinite(array).all():
            kind = str(dtype).rpartition(".")[2]
            raise InputError(
                f"{checkpoint.path}: what {name.removesuffix('.sum2')} reads is NaN or infinite, although all weights "
                f"are finite: numbers grow beyond {kind} (up to {torch.finfo(dtype).max:.3g}) on the way there; see "
                "whether transformers computes anything with this checkpoint, and use the one it was made from if not"
            )


def count_samples(inputs: Sequence[ModelInputs]) -> SampleCounts:
    """Counts of text and image samples and of text and vision tokens."""
    n_image = sum(one.has_image for one in inputs)
    n_vision = sum(int(one.is_vision.sum()) for one in inputs)
    return SampleCounts(
        text_samples=len(inputs) - n_image,
        image_samples=n_image,
        text_tokens=sum(len(one.input_ids) for one in inputs) - n_vision,
        vision_tokens=n_vision,
    )
