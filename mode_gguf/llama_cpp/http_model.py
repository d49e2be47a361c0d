"""A model in a running llama-server: the most likely tokens at every position, over HTTP.

A given answer is fed in one request by a grammar that allows just its tokens (`<[id]>`, llama.cpp's own notation),
while `n_probs` lists what the model itself finds likely, before the grammar and any sampler.
How many are listed is a matter of time, see `ServerModel`; the full vocabulary makes exact what is bounded otherwise.
"""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np

from mode_gguf.errors import InputError, MissingResourceError, ValidationError
from mode_gguf.llama_cpp.chat_template import ChatTemplate
from mode_gguf.llama_cpp.in_process import open_image
from mode_gguf.llama_cpp.model_protocol import ImageInput, Logits

Array: TypeAlias = np.ndarray

TOP: Final = 4096
"""Tokens listed per position: about 400 KB of JSON."""
ENTRIES_PER_REQUEST: Final = 1 << 20
"""Positions times listed tokens; an answer about a picture is never cut."""
TIMEOUT_SECONDS: Final = 900
_REPLACEMENT: Final = "\ufffd"
"""Unicode replacement character, which a server writes for bytes that are no character."""
_UNDERFLOW: Final = -104.0
"""The server takes logarithms of probabilities in float32, and says -3e38 where they are zero there."""
API_KEY: Final = "LLAMA_API_KEY"
"""The environment variable that llama-server reads its key from, too."""


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
    """

    def __init__(self, server: ServerUrl, top: int = TOP) -> None:
        self._url = server.url.rstrip("/")
        self._props = self._get("/props")
        try:
            meta = self._get("/v1/models")["data"][0]["meta"]
            self.n_vocab = int(meta["n_vocab"])
            self.size_bytes, self.n_weights = int(meta["size"]), int(meta["n_params"])
            self.alias, self.build = str(self._props["model_alias"]), str(self._props["build_info"])
            self._template = str(self._props["chat_template"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{self._url}: is no llama-server of 2026 ({error!r} in what it says of itself)") from None
        self.listed = min(top or self.n_vocab, self.n_vocab)
        self._takes: dict[int, bool] = {}
        self._ends = set(self.tokenize(str(self._props.get("eos_token", "")))[:1])

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
        return bool(self._props.get("modalities", {}).get("vision"))

    def identity(self) -> list[Any]:
        """Identity of the model: its file, size and number of weights, and the build that runs it."""
        return [self._props.get("model_path"), self.size_bytes, self.n_weights, self.build]

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
        plain, whole = self._tokenized("a", False, False), self._tokenized("a", True, False)
        return whole[: whole.index(plain[0])]

    @property
    def end_of_turn(self) -> list[int]:
        return [token for token in self.tokenize(self.chat_template.after_answer())[:1] if self.is_end(token)]

    @property
    def chat_template(self) -> ChatTemplate:
        props = self._props
        return ChatTemplate(self._template, props.get("bos_token", ""), props.get("eos_token", ""), self.name)

    @property
    def image_marker(self) -> str:
        return str(self._props.get("media_marker", "<__media__>"))

    def continuation_logits(self, tokens: Sequence[int]) -> Logits:
        """Log-probabilities of each of tokens[1:]; of tokens that are not listed, NaN.

        Raises:
            ValidationError: the server fails at it.
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
        done = self._complete(self._prompt(prompt, image), request)
        tokens = [int(token) for token in done.get("tokens", [])]
        if not tokens:
            raise ValidationError(f"{self.name}: the server answers without the tokens it was asked for")
        if done.get("stop_type") == "eos":
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

    def _listed(self, prompt: Any, fed: list[int], count: int) -> list[dict[str, Any]]:
        """`count` rows after `prompt`, of which the first are about the tokens `fed`.

        Where none is fed, a harmless one is: of a token within a character the server would say nothing.
        """
        allowed = " ".join(f"<[{token}]>" for token in fed or self.tokenize("a")[:1])
        request = {"n_predict": count, "n_probs": self.listed, "temperature": 0, "grammar": f"root ::= {allowed}"}
        rows: list[dict[str, Any]] = self._complete(prompt, request).get("completion_probabilities", [])
        if len(rows) != count or [row["id"] for row in rows[: len(fed)]] != fed:
            raise ValidationError(f"{self.name}: the server did not keep to a grammar of tokens; llama.cpp b11434 does")
        return rows

    def _fill(self, target: Array, row: dict[str, Any]) -> None:
        """Write one position's log-probabilities to `target`, (vocabulary,)."""
        listed = [*row["top_logprobs"], row]
        values = np.asarray([entry["logprob"] for entry in listed], np.float32)
        if not np.isfinite(values).all():
            raise ValidationError(f"{self.name}: the server gives log-probabilities that are not finite numbers")
        target[[entry["id"] for entry in listed]] = np.maximum(values, _UNDERFLOW)

    def _text(self, tokens: list[int]) -> str:
        return str(self._post("/detokenize", {"tokens": tokens})["content"])

    def _prompt(self, prompt: str, image: ImageInput | None) -> Any:
        """A prompt as the server takes it; it adds the token that every sequence begins with by itself."""
        if self.beginning:
            prompt = prompt.removeprefix(str(self._props.get("bos_token", "")))
        if image is None:
            return prompt
        buffer = io.BytesIO()
        open_image(image).save(buffer, "PNG")
        return {"prompt_string": prompt, "multimodal_data": [base64.b64encode(buffer.getvalue()).decode()]}

    def _complete(self, prompt: Any, request: dict[str, Any]) -> dict[str, Any]:
        return self._post("/completion", {"prompt": prompt, "cache_prompt": False, **request})

    def _tokenized(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._post("/tokenize", request)["tokens"]]

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self._url + path))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        return self._ask(urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        key = os.environ.get(API_KEY)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                body = error.read(2000).decode("utf-8", "replace")
            raise ValidationError(f"{request.full_url}: the server says {error.code}: {_message(body)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise MissingResourceError(
                f"{request.full_url}: no llama-server answers there ({reason}); start one with: mode-gguf run MODEL "
                "--mmproj FILE"
            ) from None
        if not isinstance(answer, dict):
            raise InputError(f"{request.full_url}: a JSON object was expected, {type(answer).__name__} found")
        return answer


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip()[:200]
