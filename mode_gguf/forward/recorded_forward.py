"""The recorded forward of all samples: layer by layer, with each layer's experts and linear layers recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mode_gguf.forward.hidden_store import HiddenStore
from mode_gguf.forward.hooks import LayerRecorder, SampleTrace, recording
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.layerwise import LayerCallbacks, no_callback, run_layerwise
from mode_gguf.forward.modality import KeyTokens
from mode_gguf.forward.offload import TensorOffload
from mode_gguf.forward.streaming import StreamedModel
from mode_gguf.options import ComputeOptions
from mode_gguf.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class LayerConsumer:
    """The consumer of a layer's records, and the recorder's settings.

    Attributes:
        leave: leave(trace, i) after a sample has left layer i (the last one includes the output head); the records
            are dropped afterwards.
        finish: finish(i) after all samples have left layer i, while its weights are still loaded.
        key_tokens: how key vision tokens are chosen; None where they are not needed.
        keep_hidden: whether the experts' gated activations are recorded.
    """

    leave: Callable[[SampleTrace, int], None]
    finish: Callable[[int], object] = no_callback
    key_tokens: KeyTokens | None = None
    keep_hidden: bool = True


def run_recorded(
    streamed: StreamedModel,
    inputs: Sequence[ModelInputs],
    consumer: LayerConsumer,
    *,
    hidden_bytes: int = ComputeOptions.hidden_memory,
    description: str,
    progress: Progress = silent,
) -> None:
    """Run all samples forward, layer by layer, with experts, linear layers and key tokens recorded; without logits.

    Args:
        hidden_bytes: memory for hidden states of suspended samples; further ones go to temporary files.
    """
    traces = [SampleTrace.of(one, streamed.device) for one in inputs]
    recorder = LayerRecorder(consumer.key_tokens, consumer.keep_hidden)

    def enter(number: int) -> None:
        recorder.current = traces[number]

    def leave(number: int, layer: int) -> None:
        consumer.leave(traces[number], layer)
        traces[number].forget()

    def free(layer: int) -> None:
        consumer.finish(layer)
        streamed.free_layer(layer)

    recorded = recording(streamed.model, streamed.recorded_linears(), recorder)
    with HiddenStore(hidden_bytes) as store, recorded, streamed.without_logits():
        run_layerwise(
            streamed.layers,
            [partial(streamed.run, one) for one in inputs],
            LayerCallbacks(load=streamed.load_layer, free=free, enter=enter, leave=leave),
            offload=TensorOffload(store, streamed.model, streamed.text_model),
            tokens=[len(one.input_ids) for one in inputs],
            description=description,
            progress=progress,
        )
