"""A model in a running llama-server: the most likely tokens at every position, over HTTP.

A given answer is fed in one request by a grammar that allows just its tokens (`<[id]>`, llama.cpp's own notation),
while `n_probs` lists what the model itself finds likely, before the grammar and any sampler.
How many are listed is a matter of time, see `ServerModel`; the full vocabulary makes exact what is bounded otherwise.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp.chat_template import ChatTemplate
from mode_gguf.llama_cpp.in_process import open_image
from mode_gguf.llama_cpp.model_protocol import ImageInput, Logits
from mode_gguf.llama_cpp.server_answers import Answer, Generated, Listed, Models, Props, Row, Text, Tokens
from mode_gguf.llama_cpp.server_client import AnswerLimits, ServerClient

Array: TypeAlias = np.ndarray

TOP: Final = 4096
"""Tokens listed per position: about 400 KB of JSON."""
ENTRIES_PER_REQUEST: Final = 1 << 20
"""Positions times listed tokens; an answer about a picture is never cut."""
ABOUT: Final = AnswerLimits(15, 1 << 24)
"""What a server says of itself, chat template included."""
WORDS: Final = AnswerLimits(15, 1 << 16)
"""Token numbers or text, besides what was sent."""
COMPLETION: Final = AnswerLimits(900, 1 << 24)
"""Besides what is listed."""
_BYTES_PER_ENTRY: Final = 256
"""Of a listed token in JSON, on average: its number, text, bytes and log-probability take about 100."""
_BYTES_PER_TOKEN: Final = 2048
"""Of the text of one token."""
_ADDED: Final = 16
"""More tokens than a text has bytes: what a vocabulary puts around it."""
_REPLACEMENT: Final = "\ufffd"
"""Unicode replacement character, which a server writes for bytes that are no character."""
_UNDERFLOW: Final = -104.0
"""The server takes logarithms of probabilities in float32, and says -3e38 where they are zero there."""

AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """Address of a running llama-server, such as http://127.0.0.1:8080."""

    url: str

    def __str__(self) -> str:
        return self.url


class ServerModel:
    """A model behind llama-server's HTTP API; implements `mode_gguf.llama_cpp.model_protocol.Model`.

    Args:
        top: how many tokens are listed per position; 0 is all of them. A vocabulary that is not larger is listed whole.

    Raises:
        MissingResourceError: no server answers.
        InputError: it is another program, or too old to say what it has loaded.
        UsageError: the address is none.
    """

    def __init__(self, server: ServerUrl, top: int = TOP) -> None:
        self._client = ServerClient(server.url)
        self._url = self._client.url
        self._props = self._client.ask("/props", Props, ABOUT)
        meta = self._client.ask("/v1/models", Models, ABOUT).first.meta
        self.n_vocab, self.size_bytes, self.n_weights = meta.n_vocab, meta.size, meta.n_params
        self.alias, self.build = self._props.model_alias, self._props.build_info
        self.listed = min(top or self.n_vocab, self.n_vocab)
        self._takes: dict[int, bool] = {}
        self._ends = set(self.tokenize(self._props.eos_token)[:1])

    @property
    def name(self) -> str:
        return f"{self.alias} at {self._url}"

    @property
    def runtime(self) -> str:
        """Version text of the server, as in reports."""
        return f"llama-server {self.build} at {self._url}"

    @property
    def has_vision(self) -> bool:
        """Whether the server has a projector loaded."""
        return self._props.modalities.vision

    def identity(self) -> list[Any]:
        """Identity of the model: its file, size and number of weights, and the build that runs it."""
        return [self._props.model_path, self.size_bytes, self.n_weights, self.build]

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return self._tokenized(text, False, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        plain = [token for token in tokens if not self.is_end(token)]
        return self._text(plain)

    def is_end(self, token: int) -> bool:
        """Whether `token` is the vocabulary's end token, or one that generation has stopped at."""
        return token in self._ends

    @cached_property
    def beginning(self) -> list[int]:
        plain, whole = self._harmless, self._tokenized("a", True, False)
        if plain not in whole:
            raise InputError(f"{self.name}: tokens of a text differ with and without what begins a sequence")
        return whole[: whole.index(plain)]

    @cached_property
    def _harmless(self) -> int:
        """A token that any grammar takes."""
        tokens = self._tokenized("a", False, False)
        if not tokens:
            raise InputError(f"{self.name}: the server has no token for the letter a")
        return tokens[0]

    @property
    def end_of_turn(self) -> list[int]:
        return [token for token in self.tokenize(self.chat_template.after_answer())[:1] if self.is_end(token)]

    @property
    def chat_template(self) -> ChatTemplate:
        props = self._props
        return ChatTemplate(props.chat_template, props.bos_token, props.eos_token, self.name)

    @property
    def image_marker(self) -> str:
        return self._props.media_marker

    def continuation_logits(self, tokens: Sequence[int]) -> Logits:
        """Log-probabilities of each of tokens[1:]; of tokens that are not listed, NaN.

        Raises:
            InputError: the server refuses, or does not do what it is asked.
            ValidationError: the model computes no numbers.
        """
        parts = []
        step = max(1, ENTRIES_PER_REQUEST // self.listed)
        for start in range(1, len(tokens), step):
            answer = list(tokens[start : start + step])
            parts.append(self._forced(list(tokens[:start]), answer, to_the_end=True))
        return np.concatenate(parts)

    def logits(self, prompt: str, answer: Sequence[int], image: ImageInput | None = None) -> Logits:
        """Log-probabilities of each token of `answer`, teacher-forced; raises as `continuation_logits` does.

        The last token, which may end the answer, is not forced, as no grammar allows an end token in its midst: what
        is listed at its position is as good.
        """
        return self._forced(self._prompt(prompt, image), list(answer), to_the_end=False)

    def generate(self, prompt: str, image: ImageInput | None = None, *, max_tokens: int = 128) -> list[int]:
        """The greedy answer, the token that ends it included; raises as `continuation_logits` does."""
        request = {"n_predict": max_tokens, "return_tokens": True, "samplers": ["top_k"], "top_k": 1}
        done = self._complete(Generated, self._prompt(prompt, image), request)
        tokens = self._known(done.tokens)
        if not 0 < len(tokens) <= max_tokens:
            raise InputError(f"{self.name}: {len(tokens)} tokens of an answer came, 1 to {max_tokens} were asked for")
        if done.stop_type == "eos":
            self._ends.add(tokens[-1])
        return tokens

    def _forced(self, prompt: Any, answer: list[int], *, to_the_end: bool) -> Logits:
        """Log-probabilities of each token of `answer` after `prompt`.

        A grammar feeds tokens up to one that it cannot take; what is likely in that one's place is listed all the same,
        and the next request goes on behind it. Behind a picture it can only go on in text: positions within a character
        stay unknown, and all of their row is NaN.

        Args:
            to_the_end: whether the last token may be fed, too; no grammar takes one that ends an answer.
        """
        found = np.full((len(answer), self.n_vocab), np.nan, np.float32)
        start = 0
        while start < len(answer):
            follows = self._continued(prompt, answer[:start])
            if follows is None:
                start += 1
                continue
            last = len(answer) if to_the_end else len(answer) - 1
            stop = next((at for at in range(start, last) if not self._is_text(answer[at])), last)
            fed = answer[start:stop]
            rows = self._listed(follows, fed, len(answer[start : stop + 1]))
            for position, row in enumerate(rows, start=start):
                self._fill(found[position], row)
            start = stop + 1
        return found

    def _continued(self, prompt: Any, fed: list[int]) -> Any:
        """`prompt` with the tokens `fed` behind it, or None where the server cannot be given just these."""
        if isinstance(prompt, list):
            return [*prompt, *fed]
        if not fed:
            return prompt
        text = self._text(fed)
        if _REPLACEMENT in text or self.tokenize(text, special=False) != fed:
            return None
        return prompt + text if isinstance(prompt, str) else {**prompt, "prompt_string": prompt["prompt_string"] + text}

    def _is_text(self, token: int) -> bool:
        """Whether a grammar takes `token`: not a byte within a character, nor a zero."""
        if token not in self._takes:
            text = self._text([token])
            self._takes[token] = bool(text) and _REPLACEMENT not in text and text[0] != "\0"
        return self._takes[token]

    def _listed(self, prompt: Any, fed: list[int], count: int) -> list[Row]:
        """`count` rows after `prompt`, of which the first are about the tokens `fed`.

        Where none is fed, a harmless one is: of a token within a character the server would say nothing.
        """
        allowed = " ".join(f"<[{token}]>" for token in fed or [self._harmless])
        request = {"n_predict": count, "n_probs": self.listed, "temperature": 0, "grammar": f"root ::= {allowed}"}
        rows = self._complete(Listed, prompt, request, count * self.listed).completion_probabilities
        if len(rows) != count or [row.id for row in rows[: len(fed)]] != fed:
            raise InputError(f"{self.name}: the server did not keep to a grammar of tokens; llama.cpp b11434 does")
        return rows

    def _fill(self, target: Array, row: Row) -> None:
        """Write one position's log-probabilities to `target`, (vocabulary,)."""
        listed = [*row.top_logprobs, row]
        if any(entry.logprob is None for entry in listed):
            raise ValidationError(f"{self.name}: the model computes log-probabilities that are no numbers")
        values = np.asarray([entry.logprob for entry in listed], np.float64)
        target[self._known([entry.id for entry in listed])] = np.maximum(values, _UNDERFLOW)

    def _known(self, tokens: list[int]) -> list[int]:
        """`tokens`, all of which must be of the vocabulary."""
        if tokens and max(tokens) >= self.n_vocab:
            raise InputError(
                f"{self.name}: the server speaks of token {max(tokens)}, its vocabulary has {self.n_vocab} tokens"
            )
        return tokens

    def _text(self, tokens: list[int]) -> str:
        limits = _raised(WORDS, _BYTES_PER_TOKEN * len(tokens))
        return self._client.ask("/detokenize", Text, limits, {"tokens": tokens}).content

    def _prompt(self, prompt: str, image: ImageInput | None) -> Any:
        """A prompt as the server takes it; it adds the token that every sequence begins with by itself."""
        if self.beginning:
            prompt = prompt.removeprefix(self._props.bos_token)
        if image is None:
            return prompt
        buffer = io.BytesIO()
        open_image(image).save(buffer, "PNG")
        return {"prompt_string": prompt, "multimodal_data": [base64.b64encode(buffer.getvalue()).decode()]}

    def _complete(self, form: type[AnswerT], prompt: Any, request: dict[str, Any], n_entries: int = 0) -> AnswerT:
        limits = _raised(COMPLETION, _BYTES_PER_ENTRY * n_entries)
        return self._client.ask("/completion", form, limits, {"prompt": prompt, "cache_prompt": False, **request})

    def _tokenized(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        most = len(text.encode(errors="replace")) + _ADDED
        tokens = self._client.ask("/tokenize", Tokens, _raised(WORDS, 16 * most), request).tokens
        if len(tokens) > most or (text and not tokens):
            raise InputError(f"{self.name}: {len(tokens)} tokens came for a text of {len(text)} characters")
        return self._known(tokens)


def _raised(limits: AnswerLimits, n_bytes: int) -> AnswerLimits:
    return replace(limits, n_bytes=limits.n_bytes + n_bytes)
