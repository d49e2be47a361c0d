"""Prompts of the probes, as inputs of a model: three texts, a chat, and a chat about a picture."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mode_gguf.architectures.images import ImageSize
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.tiktoken_model import has_tiktoken_model
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.forward.tokenizer import processor_chat_template
from mode_gguf.probes import LISTED, ChatSource, Distributions, Probe, Probes

SCORED: Final = 32
"""Positions at the end of each prompt whose predictions are kept."""
TEXTS: Final = {
    "prose": "The keeper climbed the stairs of the lighthouse every evening, forty years long, and wrote down what he "
    "saw: two fishing boats, a steamer bound for Bergen, fog in the north. “It isn't much,” he'd say, “but who else "
    "would have noticed?” Am Morgen las er die Seiten noch einmal, strich ein Wort und setzte ein anderes dafür ein. "
    "When the lamp was replaced by an automatic one, the notebooks went to the museum, where children now",
    "code": 'def moving_average(values: list[float], width: int = 3) -> list[float]:\n    """Mean of each window."""\n'
    "    if width < 1:\n        raise ValueError(f\"{width} < 1\")\n\n    sums = [0.0]\n    for value in values:\n"
    "\t\tsums.append(sums[-1] + value)  # running total\n    return [(sums[i + width] - sums[i]) / width\n"
    "            for i in range(len(values) - width + 1)]\n\n\nfor (int i = 0; i < n; ++i) { total += x[i] * 0x1F; }\n",
    "numbers and signs": "12:30, 1,234,567.89 € ~ 3 * 0.5 = ½?  2024-03-31T07:05:09Z, v1.10.2; 99% of 7654321. "
    "naïve façade, señor, Übergröße, œuvre; Привет, мир! Καλημέρα. 你好世界。今日は晴れです。 안녕하세요 नमस्ते "
    "שלום مرحبا 🙂👩‍🚀 ∑∫√ ≤ ≠ → a//b\\c {\"key\": [1, 2.5e-3, null]} https://example.org/?q=a+b&n=10#top "
    "I'LL won't  two  spaces\n\n\nand lines",
}  # fmt: skip
"""What tells tokenizers apart: apostrophes, indentation, digits, scripts, pictograms, runs of spaces."""

CHAT: Final = (
    Message("user", "Name three rivers of Europe, shortest first, and say where each of them ends."),
    Message(
        "assistant",
        "The Thames ends in the North Sea, the Rhine does so further east, and the Danube ends in the Black Sea.",
    ),
    Message("user", "And which one crosses most borders? Answer with its name and the number of countries."),
)
PICTURE_CHAT: Final = (
    Message("user", "Describe the colours of this picture from left to right, and say where it is brightest."),
    Message(
        "assistant",
        "Bands of green and violet run across the picture; it is brightest near the left edge, where they turn yellow, "
        "and darker again further to the right.",
    ),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A probe's prompt before it is run: its inputs, and the probe as it will be but for the predictions."""

    inputs: ModelInputs
    name: str
    text: str
    beginning: int = 0
    is_chat: bool = False
    picture: np.ndarray | None = None

    def predicted(self, logits: Tensor) -> Probe:
        """The probe, with what `logits` (positions, vocabulary) say behind its last tokens."""
        place = None
        if self.picture is not None:
            image = torch.nonzero(self.inputs.is_vision)[:, 0]
            place = (int(image[0]), int(image[-1]) + 1)
        return Probe(
            self.name,
            self.text,
            tuple(self.inputs.input_ids.tolist()),
            self.beginning,
            _likeliest(logits),
            self.is_chat,
            self.picture,
            place,
        )


log = logging.getLogger(__name__)


def probe_prompts(builder: InputBuilder, *, with_picture: bool) -> Iterator[Prompt]:
    """The prompts that the checkpoint's tokenizer and chat template can make; others are left out with a warning.

    Args:
        with_picture: whether there is one about a picture, of a model that takes pictures.
    """
    for name, text in TEXTS.items():
        inputs = builder.build(Sample(f"probe {name}", "probes", text=text))
        own = builder.tokenizer(text, add_special_tokens=False)["input_ids"]
        yield Prompt(inputs, name, text, max(0, len(inputs.input_ids) - len(own)))
    samples = [Sample("probe chat", "probes", messages=CHAT)]
    if with_picture and builder.family.projector_type:
        size = builder.family.vision.plain_size(builder.checkpoint)
        builder = replace(builder, max_image_pixels=max(builder.max_image_pixels, size[0] * size[1]))
        samples.append(Sample("probe picture", "probes", messages=PICTURE_CHAT, image=probe_picture(size)))
    for sample in samples:
        try:
            yield _chat_prompt(builder, sample)
        except InputError as error:
            log.warning("the exported file will not be compared with transformers on a %s: %s", sample.origin, error)


def chat_source(builder: InputBuilder) -> ChatSource | None:
    """The chat templates that transformers takes, read by itself where it can; None where there is none."""
    tokenizer = builder.tokenizer
    own = tokenizer.own_chat_template
    templates = [own.get("default") if isinstance(own, dict) else own]
    if tokenizer.chat_template not in templates:  # what the tokenizer reads is not all: there is the processor
        templates.append(processor_chat_template(builder.checkpoint.path))
    if has_tiktoken_model(builder.checkpoint.path):  # transformers reads none without code that is published with it
        templates.append(tokenizer.chat_template)
    found = tuple(dict.fromkeys(template for template in templates if template))
    return ChatSource(found, tokenizer.bos_token or "", tokenizer.eos_token or "") if found else None


def special_tokens(builder: InputBuilder, vocabulary: int) -> dict[str, int]:
    """Ids of the tokenizer's special tokens, by text; without those that are not among `vocabulary` embeddings."""
    added: dict[int, Any] = builder.tokenizer.added_tokens_decoder
    return {token.content: number for number, token in added.items() if token.special and number < vocabulary}


def probes_of(checkpoint: Checkpoint, builder: InputBuilder, dtype: torch.dtype, probes: list[Probe]) -> Probes:
    """The artefact of a checkpoint's probes."""
    return Probes(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        from_base=checkpoint.base is not None,
        chat=chat_source(builder),
        special_tokens=special_tokens(builder, min(probe.distributions.vocabulary for probe in probes)),
        probes=tuple(probes),
    )


def probe_picture(size: ImageSize) -> Image.Image:
    """Smooth waves of colour, which differ in x, in y and between channels: scaling hardly changes them."""
    x, y = np.meshgrid(*(np.arange(n) / 32 for n in size))
    colours = np.stack([np.sin(x + y), np.cos(x - y / 2), np.sin(2 * x) * np.cos(y)], axis=-1)
    return Image.fromarray((127.5 + (30 + 90 * x[..., None] / x.max()) * colours).astype(np.uint8))


def _chat_prompt(builder: InputBuilder, sample: Sample) -> Prompt:
    inputs = builder.build(sample)
    picture = np.asarray(sample.open_image()) if sample.has_image else None
    return Prompt(inputs, sample.origin.removeprefix("probe "), builder.rendered(sample), is_chat=True, picture=picture)


def _likeliest(logits: Tensor) -> Distributions:
    log_probs = logits.float().log_softmax(-1)
    vocabulary = log_probs.shape[1]
    found = log_probs.topk(LISTED if vocabulary > 4 * LISTED else vocabulary, dim=-1)
    return Distributions(found.indices.cpu().numpy().astype(np.int32), found.values.cpu().numpy(), vocabulary)
