"""The calibration stage: layer-by-layer forward of the samples; statistics per expert and modality."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import numpy as np
import torch

from mode_gguf.calibration.observers import Observer, unobserved_activations
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.denormals import denormals_flushed
from mode_gguf.forward.distributed import gathered, share_of, sum_over_ranks
from mode_gguf.forward.inputs import ModelInputs, model_inputs
from mode_gguf.forward.modality import TEXT_ATTENTION, KeyTokens
from mode_gguf.forward.recorded_forward import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.options import ComputeOptions
from mode_gguf.progress import Progress, silent


@denormals_flushed()
def calibrate(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    device: str = "auto",
    key_tokens: KeyTokens = TEXT_ATTENTION,
    hidden_bytes: int = ComputeOptions.hidden_memory,
    progress: Progress = silent,
) -> CalibrationStatistics:
    """Calibration statistics of `samples`; one decoder layer's weights are in memory at a time.

    Called by several processes together, each runs its share of the samples; all return the statistics of all.

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
    inputs = model_inputs(checkpoint, share_of(samples))
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
        samples=SampleCounts(*np.sum([astuple(one) for one in gathered(count_samples(inputs))], axis=0).tolist()),
        key_tokens=key_tokens,
        datasets=tuple(dict.fromkeys(sample.dataset for sample in samples)),
        has_vision=bool(streamed.family.projector_type),
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
