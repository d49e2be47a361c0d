"""The streamed model computes what the whole model does, and key tokens are those of eager attention."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import UsageError
from mode_gguf.forward.hooks import LayerRecorder, SampleTrace, recording
from mode_gguf.forward.inputs import ModelInputs, model_inputs
from mode_gguf.forward.layerwise import LayerCallbacks, run_layerwise
from mode_gguf.forward.modality import KEY_VISION, REDUNDANT_VISION, TEXT, KeyTokens
from mode_gguf.forward.streaming import StreamedModel, choose_device, open_streamed

CPU = torch.device("cpu")


def whole_model(folder: Path, attention: str) -> torch.nn.Module:
    """Hugging Face's own loading; it reads the module layout only."""
    model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def streamed_logits(streamed: StreamedModel, inputs: list[ModelInputs]) -> dict[int, torch.Tensor]:
    logits = {}

    def forward(number: int) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                logits[number] = streamed.model(**inputs[number].model_arguments(CPU, torch.float32)).logits

        return run

    run_layerwise(
        streamed.layers,
        [forward(number) for number in range(len(inputs))],
        LayerCallbacks(load=streamed.load_layer, free=streamed.free_layer),
        description="test",
    )
    return logits


def assert_streamed_is_plain(
    streamed: StreamedModel, inputs: list[ModelInputs], plain: torch.nn.Module, *, atol: float
) -> None:
    """All logits are those of the whole model's own forward."""
    logits = streamed_logits(streamed, inputs)
    for number, one in enumerate(inputs):
        with torch.no_grad():
            expected = plain(**one.model_arguments(CPU, torch.float32)).logits
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=atol)


def test_without_logits_only_the_output_head_does_nothing(pico: Path, samples: list[Sample]) -> None:
    checkpoint = Checkpoint.open(pico)
    inputs, streamed = model_inputs(checkpoint, samples), open_streamed(checkpoint, "cpu")
    read: list[torch.Tensor] = []
    head = streamed.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda module, arguments, output: read.append(arguments[0]))
    expected = streamed_logits(streamed, inputs)
    with streamed.without_logits():
        assert all(logits.shape[-1] == 0 for logits in streamed_logits(streamed, inputs).values())
    again = streamed_logits(streamed, inputs)
    handle.remove()
    assert len(read) == 3 * len(inputs)
    for number in range(len(inputs)):
        assert torch.equal(read[number], read[number + len(inputs)])
        assert torch.equal(again[number], expected[number])


def test_key_tokens_are_those_of_eager_attention(pico: Path, pico_module: Path, samples: list[Sample]) -> None:
    ratio = 0.3
    checkpoint = Checkpoint.open(pico)
    streamed = open_streamed(checkpoint, "cpu")
    eager = whole_model(pico_module, "eager")
    for one in model_inputs(checkpoint, samples[2:]):
        trace = SampleTrace.of(one, CPU)
        modalities: list[torch.Tensor] = []

        def forward(one: ModelInputs = one) -> None:
            streamed.model(**one.model_arguments(CPU, torch.float32))

        def leave(
            number: int, layer: int, trace: SampleTrace = trace, modalities: list[torch.Tensor] = modalities
        ) -> None:
            modalities.append(trace.modality)

        with (
            recording(streamed.model, {}, LayerRecorder(KeyTokens(ratio=ratio), keep_hidden=False, current=trace)),
            torch.no_grad(),
        ):
            run_layerwise(
                streamed.layers,
                [forward],
                LayerCallbacks(load=streamed.load_layer, free=streamed.free_layer, leave=leave),
                description="test",
            )
            attentions = eager(**one.model_arguments(CPU, torch.float32), output_attentions=True).attentions
        vision = torch.nonzero(one.is_vision)[:, 0]
        chosen = set()
        for modality, attention in zip(modalities, attentions, strict=True):
            scores = attention[0][:, one.is_query][:, :, vision].mean((0, 1))
            best = vision[scores.topk(int(ratio * len(vision))).indices]
            expected = torch.where(one.is_vision, REDUNDANT_VISION, TEXT)
            expected[best] = KEY_VISION
            assert torch.equal(modality, expected)
            chosen.add(tuple(best.sort().values.tolist()))
        assert len(chosen) > 1, "every layer chose the same tokens: the test could not tell layers apart"


def test_unknown_device() -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        choose_device("tpu")
