"""The protocol of a model under validation, in this process or behind HTTP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image

from mode_gguf.llama_cpp.chat_template import ChatTemplate

ImageInput: TypeAlias = Path | bytes | Image.Image
"""An image: a file, the bytes of one, or an opened image."""
Logits: TypeAlias = np.ndarray
"""float32 (positions, vocabulary)."""


class Model(Protocol):
    """A text model and its projector; `LlamaModel` is one in this process, `ServerModel` one behind HTTP.

    Logits may have any constant added per position. NaN are tokens that nothing is known of (`ServerModel`).
    """

    n_vocab: int

    @property
    def name(self) -> str:
        """The model's name, for messages."""

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, nothing added around it; `special` reads `<|im_start|>` and its like as one token."""

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special ones."""

    def is_end(self, token: int) -> bool:
        """Whether generation stops at `token`."""

    @property
    def beginning(self) -> list[int]:
        """The token that every sequence begins with, if the family has one."""

    @property
    def end_of_turn(self) -> list[int]:
        """The token that ends an answer in the model's chat template; empty where it ends them with plain text."""

    @property
    def chat_template(self) -> ChatTemplate:
        """The template stored with the model."""

    @property
    def image_marker(self) -> str:
        """The marker that stands for the image in a prompt."""

    def continuation_logits(self, tokens: Sequence[int]) -> Logits:
        """Logits that predict each of tokens[1:]."""

    def logits(self, prompt: str, answer: Sequence[int], image: ImageInput | None = None) -> Logits:
        """Logits of the positions that predict each token of `answer`, when `answer` itself is fed."""

    def generate(self, prompt: str, image: ImageInput | None = None, *, max_tokens: int = 128) -> list[int]:
        """The greedy answer to `prompt`: token ids, the one that ends it included."""
