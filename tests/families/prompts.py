"""Questions about a picture as transformers takes them, in the tokens that llama.cpp makes of the same."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from mode_gguf.architectures.images import ImagePlace
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.forward.inputs import InputBuilder
from tests.families.family_case import Asked, FamilyCase

TEXT = "The quick brown fox jumps over the lazy dog. What is the colour of the square? It's 12:30, héllo — 你好. "
QUESTION = "What is the colour of the circle?"
ANSWER = "The square is red. There are 3 shapes"


def waves(size: tuple[int, int]) -> Image.Image:
    """A picture of smooth colours, which shows how alike two implementations see."""
    x, y = np.meshgrid(*(np.arange(n) / 16 for n in size))
    colours = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return Image.fromarray((127.5 + 120 * colours).astype(np.uint8))


class Reference:
    """A pico checkpoint in transformers, F32, on the CPU.

    Attributes:
        checkpoint: the case's first layout, which transformers may be unable to open.
        opened: one that it opens.
        model: transformers' model of the same weights.
    """

    def __init__(self, case: FamilyCase, checkpoint: Checkpoint, opened: Checkpoint, model: Any) -> None:
        self.case, self.checkpoint, self.opened, self.model = case, checkpoint, opened, model

    @cached_property
    def builder(self) -> InputBuilder:
        return InputBuilder.open(self.checkpoint)

    @cached_property
    def tokenizer(self) -> Any:
        has_own = (self.opened.path / "tokenizer.json").exists()
        return AutoTokenizer.from_pretrained(self.opened.path) if has_own else self.builder.tokenizer

    @cached_property
    def processor(self) -> Any:
        return AutoImageProcessor.from_pretrained(self.opened.path, backend="pil")

    def tokens(self, text: str) -> list[int]:
        """Without a BOS."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def question(self, pieces: str) -> list[int]:
        """The chat template's prompt with `pieces` in the place of the image token."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        text: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokens(text.replace(self.case.image_token, pieces))

    @torch.no_grad()
    def logits(self, tokens: list[int], image: dict[str, Any] | None = None) -> np.ndarray:
        """Scores (len(tokens), vocabulary) of every next token."""
        ids, arguments = torch.tensor([tokens]), dict(image or {})
        if image and self.case.token_types:
            arguments["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        rows: np.ndarray = self.model(input_ids=ids, **arguments).logits[0].numpy()
        assert np.isfinite(rows).all()
        return rows

    def greedy(self, tokens: list[int], image: dict[str, Any], n: int) -> list[int]:
        """The `n` likeliest tokens one after the other."""
        tokens = list(tokens)
        for _ in range(n):
            tokens.append(int(self.logits(tokens, image)[-1].argmax()))
        return tokens[-n:]


def with_processor(pieces: Callable[[FamilyCase, dict[str, Any]], str], **options: Any) -> Any:
    """transformers' own image processor, with `options`; `pieces` writes what stands for the picture."""

    def ask(reference: Reference, picture: Image.Image) -> Asked:
        image = dict(reference.processor(images=[picture], return_tensors="pt", **options))
        return reference.question(pieces(reference.case, image)), image

    return ask


def merged_patches(case: FamilyCase, image: dict[str, Any]) -> str:
    """A token for four patches, as in Qwen's models."""
    return case.image_token * (int(image["image_grid_thw"].prod()) // 4)


def soft_tokens(case: FamilyCase, image: dict[str, Any]) -> str:
    """Gemma's, as many as its processor says, between their marks."""
    (n,) = image.pop("num_soft_tokens_per_image").tolist()
    assert n == case.pico.SOFT_TOKENS
    before, after = case.marks
    return f"{before}{case.image_token * n}{after}"


def rows_of_pieces(case: FamilyCase, image: dict[str, Any]) -> str:
    """Pixtral's, with a break after every row but the last."""
    height, width = (int(n) // (case.pico.PATCH * case.pico.MERGE) for n in image["image_sizes"][0])
    return "[IMG_BREAK]".join([case.image_token * width] * height) + case.marks[1]


def built(reference: Reference, picture: Image.Image) -> Asked:
    """Our own builder's, of InternVL: transformers' processor cuts pictures into other tiles."""
    inputs = reference.builder.build(Sample("test", "tests", messages=(Message("user", QUESTION),), image=picture))
    return inputs.input_ids.tolist(), dict(inputs.image)


def placed(reference: Reference, picture: Image.Image) -> Asked:
    """Kimi's, in llama.cpp's prompt, which lacks the words that the chat template has between mark and picture."""
    builder = reference.builder
    place = ImagePlace(reference.checkpoint, picture, None, builder.tokenizer, builder.image_token, 10**9)
    image = builder.family.vision.place_image(place)
    begin = "<|media_start|>" if reference.case.name == "kimi-vl" else "<|media_begin|>"
    before = reference.tokens(f"<|im_user|>user<|im_middle|>{begin}")
    after = reference.tokens(f"<|media_end|>{QUESTION}<|im_end|><|im_assistant|>assistant<|im_middle|>")
    return [*before, *image.tokens, *after], {
        name: torch.from_numpy(values) for name, values in image.arguments.items()
    }
