"""Model inputs of a sample: token ids, pixels, and the role of every token."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor

from mode_gguf.architectures import ModelFamily, find_family
from mode_gguf.architectures.images import ImagePlace, PlacedImage, joined_arguments
from mode_gguf.chat_templates.rendering import TemplateError, render
from mode_gguf.chat_templates.sources import chat_templates, log_choice
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.side_files import unmarked
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError, foreign_errors
from mode_gguf.forward.image_settings import check_image_settings, check_shared_lengths
from mode_gguf.forward.limits import MAX_IMAGE_PIXELS, MAX_TOKENS
from mode_gguf.forward.modality import ANSWERS
from mode_gguf.forward.tokenizer import check_tokens, open_tokenizer
from mode_gguf.text_prefix import sufficient_prefix

__all__ = ["ANSWERS", "InputBuilder", "ModelInputs", "model_inputs"]

_TEMPLATE, _PROMPT, _ANSWER = range(3)
_Span: TypeAlias = tuple[int, int, int]
"""First character of a text, the one after its last, and whose it is."""
_CHARACTERS_BEFORE = 64
"""Characters that may stand before the last picture of a sample, per text token of its limit."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Input tensors of one sample, on the CPU; S tokens.

    Attributes:
        origin: of the sample.
        input_ids: (S,) int64.
        is_vision: (S,) bool, placeholders that the images' embeddings replace.
        is_query: (S,) bool, text tokens after the last image that belong to a message, not to the template.
        scored: (n,) int64, positions whose next-token distribution counts: every one that has a next token in a
            sample without image, those that predict the tokens of answers after the first image in one with images.
        image: the images' arguments of the model's forward, by name; `pixel_values` in float32. Empty without one.
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
            max_image_pixels: a sample's images are scaled down to this area together, where the model's own limits are
                not lower.

        Raises:
            InputError: the checkpoint lacks either, or has no image token.
        """
        family = find_family(checkpoint)
        image_processor, image_token = None, -1
        tokenizer = open_tokenizer(checkpoint, family)
        templates = chat_templates(checkpoint.path)
        log_choice(templates.file, templates.overruled)
        if family.projector_type and family.vision.needs_processor:
            check_image_settings(checkpoint)
            with foreign_errors(
                f"{checkpoint.path}: the image processor cannot be read", "use the one published with these weights"
            ):
                image_processor = _image_processor(checkpoint)
            check_shared_lengths(checkpoint, image_processor)
        if family.projector_type:
            image_token = family.vision.image_token(checkpoint)
            _check_image_token(checkpoint, tokenizer, image_token)
        return cls(checkpoint, family, tokenizer, image_processor, image_token, max_tokens, max_image_pixels)

    def build(self, sample: Sample) -> ModelInputs:
        """The inputs of `sample`.

        Raises:
            InputError: the sample's image cannot be read, its text is shorter than two tokens, or the checkpoint's
                chat template drops a message or does not place all images.
        """
        if sample.text is not None:
            with foreign_errors(f"{sample.origin}: {self.checkpoint.path}'s tokenizer cannot read its text"):
                text = sufficient_prefix(sample.text, self.max_tokens, self._count)
                encoded = self.tokenizer(text, truncation=True, max_length=self.max_tokens)
            return self._text_inputs(sample, torch.tensor(encoded["input_ids"], dtype=torch.int64))
        if sample.has_image and not self.family.projector_type:
            raise InputError(f"{sample.origin}: has an image, and {self.checkpoint.path} is a text-only model")
        rendered, spans = self._render(sample)
        with foreign_errors(f"{sample.origin}: {self.checkpoint.path}'s tokenizer cannot read its messages"):
            rendered, spans = self._shortened(sample, rendered, spans)
            encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        if not sample.has_image:
            return self._text_inputs(sample, ids[: self.max_tokens])
        owner = torch.tensor([_owner(start, end, spans) for start, end in encoded["offset_mapping"]])
        return self._image_inputs(sample, ids, owner)

    def rendered(self, sample: Sample) -> str:
        """The chat of `sample` as one string, by the checkpoint's chat template; raises like `build`."""
        return self._render(sample)[0]

    def _count(self, text: str) -> int:
        """Number of tokens of a text, however long."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _shortened(self, sample: Sample, rendered: str, spans: list[_Span]) -> tuple[str, list[_Span]]:
        """A chat without what lies far behind the tokens that are used of it, and its spans.

        Raises:
            InputError: too much text stands before the last picture.
        """
        end = 0
        if sample.has_image:
            token: str = self.tokenizer.convert_ids_to_tokens(self.image_token)
            end = rendered.rfind(token) + len(token)
        if end > (most := _CHARACTERS_BEFORE * self.max_tokens):
            raise InputError(
                f"{sample.origin}: {end:,} characters stand before the last picture, {most:,} at most are read; "
                "shorten the text"
            )
        used = rendered[:end] + sufficient_prefix(rendered[end:], self.max_tokens, self._count)
        return used, [span for span in spans if span[0] < len(used)]

    def _text_inputs(self, sample: Sample, ids: Tensor) -> ModelInputs:
        if len(ids) < 2:
            raise InputError(f"{sample.origin}: text is shorter than two tokens")
        no_tokens = torch.zeros(len(ids), dtype=torch.bool)
        return ModelInputs(sample.origin, ids, no_tokens, no_tokens, torch.arange(len(ids) - 1))

    def _image_inputs(self, sample: Sample, ids: Tensor, owner: Tensor) -> ModelInputs:
        places: list[int] = torch.nonzero(ids == self.image_token)[:, 0].tolist()
        if len(places) != len(sample.images):
            raise InputError(
                f"{sample.origin}: the chat template placed {len(places)} images where {len(sample.images)} were "
                "expected"
            )
        parts, owners, ends, placed, start = [], [], [], [], 0
        for place, opened in zip(places, sample.open_images(), strict=True):
            with foreign_errors(
                f"{sample.origin}: {self.checkpoint.path}'s image processor cannot take a picture of "
                f"{opened.width} x {opened.height}",
                "leave the picture out, or see that preprocessor_config.json is the one published with these weights",
            ):
                placed.append(self._place(opened, self.max_image_pixels // len(places)))
                tokens = torch.tensor(placed[-1].tokens, dtype=torch.int64)
            parts += [ids[start:place], tokens]
            owners += [owner[start:place], torch.full_like(tokens, _TEMPLATE)]
            ends.append(sum(len(part) for part in parts))
            start = place + 1
        rest = slice(start, start + self.max_tokens)
        ids, owner = torch.cat([*parts, ids[rest]]), torch.cat([*owners, owner[rest]])
        is_vision = ids == self.image_token
        after_first, after_last = torch.arange(len(ids)) >= ends[0], torch.arange(len(ids)) >= ends[-1]
        answered = after_first & (owner == _ANSWER)
        said = after_first & (owner != _TEMPLATE)
        is_query = after_last & said
        if answered.any():
            scored = torch.nonzero(answered)[:, 0] - 1
        else:
            # Without an answer (or with one cut off) all message tokens after an image count, and what comes next.
            scored = torch.cat([torch.nonzero(said)[:, 0] - 1, torch.tensor([len(ids) - 1])])
        if not is_query.any():
            is_query = after_last
        if not is_query.any():
            raise InputError(f"{sample.origin}: no text follows the image within {self.max_tokens} tokens")
        arguments = joined_arguments(placed, sample.origin)
        image = {name: torch.from_numpy(values) for name, values in arguments.items()}
        return ModelInputs(sample.origin, ids, is_vision, is_query, scored, image, self.family.vision.token_types)

    def _place(self, image: Image.Image, max_pixels: int) -> PlacedImage:
        return self.family.vision.place_image(
            ImagePlace(
                self.checkpoint, image, self.image_processor, self.tokenizer, self.image_token, max(1, max_pixels)
            )
        )

    def _render(self, sample: Sample) -> tuple[str, list[_Span]]:
        """The chat as one string, and (start, end, owner) of every message's texts in it."""
        # Rendered with markers in place of the messages: their texts could occur in the template, too.
        chat: list[dict[str, Any]] = []
        texts: list[tuple[str, str, str]] = []  # marker, text and role
        for message in sample.turns:
            ends = [0, *message.pictures, len(message.text)]
            parts: list[dict[str, Any]] = []
            for number, (start, end) in enumerate(pairwise(ends)):
                if number:
                    parts.append({"type": "image"})
                if start < end or number == len(message.pictures):
                    texts.append((f"\ue000{len(texts)}\ue001", message.text[start:end], message.role))
                    parts.append({"type": "text", "text": texts[-1][0]})
            chat.append({"role": message.role, "content": parts if message.pictures else texts[-1][0]})
        answered = sample.messages[-1].role == "assistant"
        try:
            rest = self._with_image(chat, answered) if sample.has_image else self._templated(chat, answered)
        except TemplateError as error:
            templates = chat_templates(self.checkpoint.path)
            if error.over_limit or not self._renders_anything():
                raise InputError(f"{templates.file}: the chat template cannot be used: {error}") from error
            raise InputError(f"{sample.origin}: the chat template of {templates.file} fails: {error}") from error
        rendered = ""
        spans = []
        for marker, text, role in texts:
            before, found, rest = rest.partition(marker)
            if not found:
                file = chat_templates(self.checkpoint.path).file
                raise InputError(f"{sample.origin}: the chat template of {file} drops the {role}'s message")
            start = len(rendered) + len(before)
            rendered += before + text
            spans.append((start, len(rendered), _ANSWER if role == "assistant" else _PROMPT))
        return rendered + rest, spans

    def _with_image(self, chat: list[dict[str, Any]], answered: bool) -> str:
        """The chat with its images among the users' texts, where the image token stands for each."""
        token: str = self.tokenizer.convert_ids_to_tokens(self.image_token)
        placeholder = self.family.vision.placeholder or token
        try:
            rendered = self._templated(chat, answered)
        except TemplateError as error:
            if self.family.vision.placeholder is None or error.over_limit:
                raise
            rendered = ""
        if self.family.vision.placeholder is not None and placeholder not in rendered and token not in rendered:
            # A template that knows no parts: images are written into the text.
            flat = [turn | {"content": _written(turn["content"], f"{placeholder}\n")} for turn in chat]
            rendered = self._templated(flat, answered)
        return rendered.replace(placeholder, token)

    def _templated(self, chat: list[dict[str, Any]], answered: bool) -> str:
        source = self.tokenizer.chat_template
        if source is None:
            source = chat_templates(self.checkpoint.path).required()
        variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": not answered}
        return render(source, {**self.tokenizer.special_tokens_map, **variables})

    def _renders_anything(self) -> bool:
        """Whether the template takes the plainest of chats; if not, it is no sample's fault."""
        try:
            self._templated([{"role": "user", "content": "?"}], False)
        except TemplateError:
            return False
        return True


def check_inputs(
    checkpoint: Checkpoint, *, chats: bool = True, pictures: bool = True, tokens: Sequence[str] | None = None
) -> None:
    """Make the inputs of one short chat, and of one about a picture: tokenizer, template and image processor work.

    Args:
        chats: whether samples with messages are going to be used, for which there must be a template.
        pictures: whether samples with pictures are; a text-only model takes none.
        tokens: of the GGUF file, by id, which must be what transformers reads, too; None to leave that out.

    Raises:
        InputError: as `InputBuilder.open` and `InputBuilder.build` do, of the checkpoint's files.
    """
    builder = InputBuilder.open(checkpoint)
    if tokens is not None:
        check_tokens(checkpoint, builder.tokenizer, tokens)
    chat = (Message("user", "What is this?"), Message("assistant", "A square."))
    images = [None] * chats + [Image.new("RGB", (64, 64))] * bool(pictures and builder.family.projector_type)
    for image in images:
        builder.build(Sample(str(checkpoint.path), "check", messages=chat, image=image))


def model_inputs(checkpoint: Checkpoint, samples: Iterable[Sample]) -> list[ModelInputs]:
    """The inputs of `samples` within the default limits; raises what `InputBuilder` does."""
    builder = InputBuilder.open(checkpoint)
    return [builder.build(sample) for sample in samples]


def _check_image_token(checkpoint: Checkpoint, tokenizer: Any, number: int) -> None:
    with foreign_errors(f"{checkpoint.path}: the tokenizer has no token {number}, the image token of config.json"):
        token = tokenizer.convert_ids_to_tokens(number)
    if not isinstance(token, str):
        raise InputError(
            f"{checkpoint.path}: the tokenizer has no token {number}, the image token of config.json; use the "
            "tokenizer published with these weights"
        )


def _image_processor(checkpoint: Checkpoint) -> Any:
    """The image processor; for a model without a family its whole processor, which knows the tokens around images."""
    with unmarked(checkpoint.path) as folder:
        if checkpoint.base is not None:
            try:
                return AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
            except (OSError, ValueError, ImportError, TypeError, AttributeError):
                pass  # a part of it, such as one for video, cannot be used here
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def _written(content: str | list[dict[str, Any]], placeholder: str) -> str:
    """A turn's content as one text, in which a placeholder stands for every image."""
    if isinstance(content, str):
        return content
    return "".join(placeholder if part["type"] == "image" else part["text"] for part in content)


def _owner(start: int, end: int, spans: list[_Span]) -> int:
    """Owner of the token of characters start to end: the message it overlaps with, else the template."""
    return next((owner for first, last, owner in spans if start < last and end > first), _TEMPLATE)
