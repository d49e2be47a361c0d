"""Model inputs of a sample: token ids, pixels, and the role of every token."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor

from mode_gguf.architectures import ModelFamily, find_family
from mode_gguf.architectures.images import ImagePlace
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError
from mode_gguf.forward.limits import MAX_IMAGE_PIXELS, MAX_TOKENS
from mode_gguf.forward.modality import ANSWERS
from mode_gguf.forward.tokenizer import open_tokenizer

__all__ = ["ANSWERS", "InputBuilder", "ModelInputs", "model_inputs"]


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Input tensors of one sample, on the CPU; S tokens.

    Attributes:
        origin: of the sample.
        input_ids: (S,) int64.
        is_vision: (S,) bool, placeholders that the image's embeddings replace.
        is_query: (S,) bool, text tokens after the image that belong to a message, not to the template.
        scored: (n,) int64, positions whose next-token distribution counts: every one that has a next token in a
            sample without image, those that predict the answer's tokens in one with an image.
        image: the image's arguments of the model's forward, by name; `pixel_values` in float32. Empty without one.
        token_types: argument that takes `is_vision`, None for models that do not ask.
    """

    origin: str
    input_ids: Tensor
    is_vision: Tensor
    is_query: Tensor
    scored: Tensor
    image: Mapping[str, Tensor] = field(default_factory=dict)
    token_types: str | None = None

    @property
    def has_image(self) -> bool:
        return bool(self.image)

    @property
    def answer(self) -> int:
        """Index into `ANSWERS`."""
        return int(self.has_image)

    def model_arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the model's forward, as a batch of one."""
        arguments: dict[str, Any] = {"input_ids": self.input_ids[None].to(device), "use_cache": False}
        for name, value in self.image.items():
            arguments[name] = value.to(device, dtype if value.is_floating_point() else None)
        if self.has_image and self.token_types is not None:
            arguments[self.token_types] = self.is_vision[None].int().to(device)
        return arguments


@dataclass(frozen=True, slots=True)
class InputBuilder:
    """A checkpoint's tokenizer and image processor; make one with `InputBuilder.open`."""

    checkpoint: Checkpoint
    family: ModelFamily
    tokenizer: Any
    image_processor: Any
    image_token: int
    max_tokens: int
    max_image_pixels: int

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        max_tokens: int = MAX_TOKENS,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> "InputBuilder":
        """Read tokenizer and image processor (its PIL implementation: torchvision is not needed).

        Args:
            max_tokens: text tokens per sample; longer texts and answers are cut.
            max_image_pixels: images are scaled down to this area, where the model's own limit is not lower.

        Raises:
            InputError: the checkpoint lacks either, or has no image token.
        """
        family = find_family(checkpoint)
        image_processor, image_token = None, -1
        try:
            tokenizer = open_tokenizer(checkpoint, family)
            if family.projector_type and family.vision.needs_processor:
                image_processor = _image_processor(checkpoint)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{checkpoint.path}: tokenizer or image processor cannot be read ({reason})") from error
        if family.projector_type:
            image_token = family.vision.image_token(checkpoint)
        return cls(checkpoint, family, tokenizer, image_processor, image_token, max_tokens, max_image_pixels)

    def build(self, sample: Sample) -> ModelInputs:
        """The inputs of `sample`.

        Raises:
            InputError: the sample's image cannot be read, its text is shorter than two tokens, or the checkpoint's
                chat template drops a message or does not place exactly one image.
        """
        if sample.text is not None:
            encoded = self.tokenizer(sample.text, truncation=True, max_length=self.max_tokens)
            return self._text_inputs(sample, torch.tensor(encoded["input_ids"], dtype=torch.int64))
        if sample.has_image and not self.family.projector_type:
            raise InputError(f"{sample.origin}: has an image, and {self.checkpoint.path} is a text-only model")
        rendered, spans = self._render(sample)
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        if not sample.has_image:
            return self._text_inputs(sample, ids[: self.max_tokens])
        owner = torch.tensor([_owner(start, end, spans) for start, end in encoded["offset_mapping"]])
        return self._image_inputs(sample, ids, owner)

    def rendered(self, sample: Sample) -> str:
        """The chat of `sample` as one string, by the checkpoint's chat template; raises like `build`."""
        return self._render(sample)[0]

    def _text_inputs(self, sample: Sample, ids: Tensor) -> ModelInputs:
        if len(ids) < 2:
            raise InputError(f"{sample.origin}: text is shorter than two tokens")
        no_tokens = torch.zeros(len(ids), dtype=torch.bool)
        return ModelInputs(sample.origin, ids, no_tokens, no_tokens, torch.arange(len(ids) - 1))

    def _image_inputs(self, sample: Sample, ids: Tensor, owner: Tensor) -> ModelInputs:
        placeholder = torch.nonzero(ids == self.image_token)[:, 0]
        if len(placeholder) != 1:
            raise InputError(
                f"{sample.origin}: the chat template placed {len(placeholder)} images where one was expected"
            )
        position = int(placeholder[0])
        placed = self.family.vision.place_image(
            ImagePlace(
                self.checkpoint,
                sample.open_image(),
                self.image_processor,
                self.tokenizer,
                self.image_token,
                self.max_image_pixels,
            )
        )
        tokens = torch.tensor(placed.tokens, dtype=torch.int64)
        rest = slice(position + 1, position + 1 + self.max_tokens)
        ids = torch.cat([ids[:position], tokens, ids[rest]])
        owner = torch.cat([owner[:position], torch.full_like(tokens, _TEMPLATE), owner[rest]])
        is_vision = ids == self.image_token
        after_image = torch.arange(len(ids)) >= position + len(tokens)
        is_query = after_image & (owner != _TEMPLATE)
        answered = after_image & (owner == _ANSWER)
        if answered.any():
            scored = torch.nonzero(answered)[:, 0] - 1
        else:
            # Without an answer (or with one cut off) all message tokens after the image count, and what comes next.
            scored = torch.cat([torch.nonzero(is_query)[:, 0] - 1, torch.tensor([len(ids) - 1])])
        if not is_query.any():
            is_query = after_image
        if not is_query.any():
            raise InputError(f"{sample.origin}: no text follows the image within {self.max_tokens} tokens")
        image = {name: torch.from_numpy(values) for name, values in placed.arguments.items()}
        return ModelInputs(sample.origin, ids, is_vision, is_query, scored, image, self.family.vision.token_types)

    def _render(self, sample: Sample) -> tuple[str, list[tuple[int, int, int]]]:
        """The chat as one string, and (start, end, owner) of every message's text in it."""
        # Rendered with markers in place of the messages: their texts could occur in the template, too.
        markers = [f"\ue000{number}\ue001" for number in range(len(sample.messages))]
        chat: list[dict[str, Any]] = [
            {"role": message.role, "content": marker} for message, marker in zip(sample.messages, markers, strict=True)
        ]
        answered = sample.messages[-1].role == "assistant"
        try:
            rest = self._with_image(chat, answered) if sample.has_image else self._templated(chat, answered)
        except (ValueError, TypeError, TemplateError) as error:
            raise InputError(f"{sample.origin}: the chat template failed ({error})") from error
        rendered = ""
        spans = []
        for message, marker in zip(sample.messages, markers, strict=True):
            before, found, rest = rest.partition(marker)
            if not found:
                raise InputError(f"{sample.origin}: the chat template drops the {message.role}'s message")
            start = len(rendered) + len(before)
            rendered += before + message.text
            spans.append((start, len(rendered), _ANSWER if message.role == "assistant" else _PROMPT))
        return rendered + rest, spans

    def _with_image(self, chat: list[dict[str, Any]], answered: bool) -> str:
        """The chat with an image ahead of the user's first text, where the image token stands for it."""
        token: str = self.tokenizer.convert_ids_to_tokens(self.image_token)
        placeholder = self.family.vision.placeholder or token
        first = next(turn for turn in chat if turn["role"] == "user")
        text = first["content"]
        first["content"] = [{"type": "image"}, {"type": "text", "text": text}]
        try:
            rendered = self._templated(chat, answered)
        except (ValueError, TypeError, TemplateError):
            if self.family.vision.placeholder is None:
                raise
            rendered = ""
        if self.family.vision.placeholder is not None and placeholder not in rendered and token not in rendered:
            # A template that knows no parts: images are written into the text.
            first["content"] = f"{placeholder}\n{text}"
            rendered = self._templated(chat, answered)
        return rendered.replace(placeholder, token)

    def _templated(self, chat: list[dict[str, Any]], answered: bool) -> str:
        rendered: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=not answered)
        return rendered


def model_inputs(checkpoint: Checkpoint, samples: Iterable[Sample]) -> list[ModelInputs]:
    """The inputs of `samples` within the default limits; raises what `InputBuilder` does."""
    builder = InputBuilder.open(checkpoint)
    return [builder.build(sample) for sample in samples]


def _image_processor(checkpoint: Checkpoint) -> Any:
    """The image processor; for a model without a family its whole processor, which knows the tokens around images."""
    if checkpoint.base is not None:
        try:
            return AutoProcessor.from_pretrained(checkpoint.path, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, ImportError, TypeError, AttributeError):
            pass  # a part of it, such as one for video, cannot be used here
    return AutoImageProcessor.from_pretrained(checkpoint.path, backend="pil", trust_remote_code=False)


_TEMPLATE, _PROMPT, _ANSWER = range(3)


def _owner(start: int, end: int, spans: list[tuple[int, int, int]]) -> int:
    """Owner of the token of characters start to end: the message it overlaps with, else the template."""
    return next((owner for first, last, owner in spans if start < last and end > first), _TEMPLATE)
