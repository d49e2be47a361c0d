"""From a sample to what the model is fed: token ids, pixels, and what every token is."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from mode_gguf.architectures import find_family
from mode_gguf.calibration.limits import MAX_IMAGE_PIXELS, MAX_TOKENS
from mode_gguf.calibration.sample import Sample
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError

ANSWERS = ("text", "image")
"""Kinds of scored positions, in the order of every array: of samples without, and with, an image."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One sample as tensors on the CPU; S tokens.

    Attributes:
        origin: of the sample.
        input_ids: (S,) int64.
        is_vision: (S,) bool, placeholders that the image's embeddings replace.
        is_query: (S,) bool, text tokens after the image that belong to a message, not to the template.
        scored: (n,) int64, positions whose next-token distribution counts: every one that has a next token in a
            sample without image, those that predict the answer's tokens in one with an image.
        pixel_values: (patches, values) float32, or None.
        image_grid_thw: (1, 3) int64 patches per axis, or None.
    """

    origin: str
    input_ids: Tensor
    is_vision: Tensor
    is_query: Tensor
    scored: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None

    @property
    def has_image(self) -> bool:
        return self.pixel_values is not None

    @property
    def answer(self) -> int:
        """Index into `ANSWERS`."""
        return int(self.has_image)

    def model_arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the model's forward, as a batch of one."""
        arguments: dict[str, Any] = {"input_ids": self.input_ids[None].to(device), "use_cache": False}
        if self.pixel_values is not None and self.image_grid_thw is not None:
            arguments["pixel_values"] = self.pixel_values.to(device, dtype)
            arguments["image_grid_thw"] = self.image_grid_thw.to(device)
            arguments["mm_token_type_ids"] = self.is_vision[None].int().to(device)
        return arguments


@dataclass(frozen=True, slots=True)
class InputBuilder:
    """A checkpoint's tokenizer and image processor; make one with `InputBuilder.open`."""

    tokenizer: Any
    image_processor: Any
    image_token_id: int
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
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
            image_processor = AutoImageProcessor.from_pretrained(
                checkpoint.path, backend="pil", trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{checkpoint.path}: tokenizer or image processor cannot be read ({reason})") from error
        key = find_family(checkpoint).image_token_key
        if key not in checkpoint.config:
            raise InputError(f"{checkpoint.path}: config.json names no {key}; not a vision-language model")
        image_token_id = int(checkpoint.config[key])
        return cls(tokenizer, image_processor, image_token_id, max_tokens, max_image_pixels)

    def build(self, sample: Sample) -> ModelInputs:
        """The inputs of `sample`.

        Raises:
            InputError: the sample's image cannot be read, its text is shorter than two tokens, or the checkpoint's
                chat template drops a message or does not place exactly one image.
        """
        if sample.text is not None:
            encoded = self.tokenizer(sample.text, truncation=True, max_length=self.max_tokens)
            return self._text_inputs(sample, torch.tensor(encoded["input_ids"], dtype=torch.int64))
        rendered, spans = self._render(sample)
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        if not sample.has_image:
            return self._text_inputs(sample, ids[: self.max_tokens])
        owner = torch.tensor([_owner(start, end, spans) for start, end in encoded["offset_mapping"]])
        return self._image_inputs(sample, ids, owner)

    def _text_inputs(self, sample: Sample, ids: Tensor) -> ModelInputs:
        if len(ids) < 2:
            raise InputError(f"{sample.origin}: text is shorter than two tokens")
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        return ModelInputs(sample.origin, ids, nothing, nothing, torch.arange(len(ids) - 1))

    def _image_inputs(self, sample: Sample, ids: Tensor, owner: Tensor) -> ModelInputs:
        placeholder = torch.nonzero(ids == self.image_token_id)[:, 0]
        if len(placeholder) != 1:
            raise InputError(
                f"{sample.origin}: the chat template placed {len(placeholder)} images where one was expected"
            )
        place = int(placeholder[0])
        pixels, grid = self._pixels(sample.open_image())
        n_vision = int(grid.prod()) // self.image_processor.merge_size**2
        end = min(len(ids), place + 1 + self.max_tokens)
        repeats = torch.ones(end, dtype=torch.int64)
        repeats[place] = n_vision
        ids, owner = ids[:end].repeat_interleave(repeats), owner[:end].repeat_interleave(repeats)
        is_vision = ids == self.image_token_id
        after_image = torch.arange(len(ids)) >= place + n_vision
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
        return ModelInputs(sample.origin, ids, is_vision, is_query, scored, pixels, grid)

    def _pixels(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        size = dict(self.image_processor.size)
        longest = min(size["longest_edge"], self.max_image_pixels)  # despite their names, both are areas in pixels
        size |= {"longest_edge": longest, "shortest_edge": min(size["shortest_edge"], longest)}
        processed = self.image_processor(images=[image], size=size, return_tensors="pt")
        return processed["pixel_values"], processed["image_grid_thw"]

    def _render(self, sample: Sample) -> tuple[str, list[tuple[int, int, int]]]:
        """The chat as one string, and (start, end, owner) of every message's text in it."""
        # Rendered with marks in place of the messages: their texts could occur in the template, too.
        marks = [f"\ue000{number}\ue001" for number in range(len(sample.messages))]
        chat: list[dict[str, Any]] = [
            {"role": message.role, "content": mark} for message, mark in zip(sample.messages, marks, strict=True)
        ]
        if sample.has_image:
            first = next(turn for turn in chat if turn["role"] == "user")
            first["content"] = [{"type": "image"}, {"type": "text", "text": first["content"]}]
        answered = sample.messages[-1].role == "assistant"
        try:
            rest: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=not answered)
        except (ValueError, TemplateError) as error:
            raise InputError(f"{sample.origin}: the chat template failed ({error})") from error
        rendered = ""
        spans = []
        for message, mark in zip(sample.messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise InputError(f"{sample.origin}: the chat template drops the {message.role}'s message")
            start = len(rendered) + len(before)
            rendered += before + message.text
            spans.append((start, len(rendered), _ANSWER if message.role == "assistant" else _PROMPT))
        return rendered + rest, spans


_TEMPLATE, _PROMPT, _ANSWER = range(3)


def _owner(start: int, end: int, spans: list[tuple[int, int, int]]) -> int:
    """Whose the token of characters start to end is: the message's it overlaps with, else the template's."""
    return next((owner for first, last, owner in spans if start < last and end > first), _TEMPLATE)
