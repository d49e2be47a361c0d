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
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np

from mode_gguf.errors import InputError, MissingResourceError, ValidationError
from mode_gguf.validation.chat import ChatTemplate
from mode_gguf.validation.llama_cpp import open_image
from mode_gguf.validation.models import ImageInput, Logits

Array: TypeAlias = np.ndarray

TOP: Final = 4096
"""Tokens listed per position: about 400 KB of JSON."""
ENTRIES_PER_REQUEST: Final = 1 << 20
"""Positions times listed tokens; an answer about a picture is never cut."""
TIMEOUT_SECONDS: Final = 900
_PREFERENCE: Final = 1000.0
"""Added to a token's logit: more than logits differ by."""
_UNDERFLOW: Final = -104.0
"""The server takes logarithms of probabilities in float32, and says -3e38 where they are zero there."""
API_KEY: Final = "LLAMA_API_KEY"
"""The environment variable that llama-server reads its key from, too."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a llama-server listens, such as http://127.0.0.1:8080."""

    url: str

    def __str__(self) -> str:
        return self.url


class ServerModel:
    """What a llama-server has loaded; see `mode_gguf.validation.models.Model`.

    Args:
        top: how many tokens are listed per position; 0 is all of them. A vocabulary that is not larger is listed whole.

    Raises:
        MissingResourceError: nobody answers.
        InputError: it is another program, or too old to say what it has loaded.
    """

    def __init__(self, server: Server, top: int = TOP) -> None:
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
        self._cut: dict[tuple[int, ...], bool] = {}
        self._ends = set(self.tokenize(str(self._props.get("eos_token", "")))[:1])

    @property
    def name(self) -> str:
        return f"{self.alias} at {self._url}"

    @property
    def runtime(self) -> str:
        """How reports name it."""
        return f"llama-server {self.build} at {self._url}"

    @property
    def sees(self) -> bool:
        """Whether it has a projector loaded."""
        return bool(self._props.get("modalities", {}).get("vision"))

    def identity(self) -> list[Any]:
        """What tells a model from another: its file, size and weights, and the build that runs it."""
        return [self._props.get("model_path"), self.size_bytes, self.n_weights, self.build]

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return self._tokenized(text, False, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        plain = [token for token in tokens if not self.is_end(token)]
        return self._text(plain)

    def is_end(self, token: int) -> bool:
        """Whether it is the vocabulary's end token, or one that generation has stopped at."""
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
            parts.append(self._forced(list(tokens[:start]), answer, forced=len(answer)))
        return np.concatenate(parts)

    def logits(self, prompt: str, answer: Sequence[int], image: ImageInput | None = None) -> Logits:
        """Log-probabilities of each token of `answer`, teacher-forced; raises as `continuation_logits` does.

        The last token, which may end the answer, is not forced, as no grammar allows an end token in its midst: what
        is listed at its position is as good.
        """
        return self._forced(self._prompt(prompt, image), list(answer), forced=len(answer) - 1)

    def generate(self, prompt: str, image: ImageInput | None = None, *, max_tokens: int = 128) -> list[int]:
        """The greedy answer, the token that ends it included; raises as `continuation_logits` does."""
        request = {"n_predict": max_tokens, "n_probs": 1, "samplers": ["top_k"], "top_k": 1}
        done = self._complete(self._prompt(prompt, image), request)
        tokens = [int(row["id"]) for row in done["completion_probabilities"]]
        if done.get("stop_type") == "eos":
            self._ends.add(tokens[-1])
        return tokens

    def _forced(self, prompt: Any, answer: list[int], forced: int) -> Logits:
        """Log-probabilities of each token of `answer` after `prompt`, of which the first `forced` are fed.

        A server says nothing of a token after which its text ends within a character. Where the prompt is tokens,
        these positions are asked for one by one; otherwise all of their row is NaN.
        """
        grammar, preferred, seen = self._grammar(answer[:forced])
        seen += [True] * (len(answer) - forced)
        request = {"n_predict": len(answer), "grammar": grammar, "logit_bias": preferred}
        rows = self._listed(prompt, request if forced else {"n_predict": 1})
        expected = [token for token, is_seen in zip(answer[:forced], seen, strict=False) if is_seen]
        if [row["id"] for row in rows[: len(expected)]] != expected or len(rows) != sum(seen):
            raise ValidationError(f"{self.name}: the server did not keep to a grammar of tokens; llama.cpp b11434 does")
        found = np.full((len(answer), self.n_vocab), np.nan, np.float32)
        for position, row in zip(np.flatnonzero(seen), rows, strict=True):
            self._fill(found[position], row)
        if isinstance(prompt, list):
            any_text = self._grammar(self.tokenize("a"))[0]
            for position in np.flatnonzero(np.logical_not(seen)):
                [row] = self._listed([*prompt, *answer[:position]], {"n_predict": 1, "grammar": any_text})
                self._fill(found[position], row)
        return found

    def _listed(self, prompt: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
        request = {"n_probs": self.listed, "temperature": 0, **request}
        rows: list[dict[str, Any]] = self._complete(prompt, request)["completion_probabilities"]
        return rows

    def _fill(self, target: Array, row: dict[str, Any]) -> None:
        """Write one position's log-probabilities to `target`, (vocabulary,)."""
        listed = [*row["top_logprobs"], row]
        values = np.asarray([entry["logprob"] for entry in listed], np.float32)
        if not np.isfinite(values).all():
            raise ValidationError(f"{self.name}: the server gives log-probabilities that are not finite numbers")
        target[[entry["id"] for entry in listed]] = np.maximum(values, _UNDERFLOW)

    def _grammar(self, tokens: list[int]) -> tuple[str, list[tuple[int, float]], list[bool]]:
        """What allows `tokens` alone, a bias that makes it choose them, and which the server will say something of.

        No grammar takes a part of a character as a token. Runs of such parts are asked for as the characters they make
        up, and preferred to other tokens that make up the same: what is listed is as if there were no bias.

        Raises:
            InputError: the parts make up no characters.
        """
        parts: list[str] = []
        preferred: set[int] = set()
        seen: list[bool] = []
        for whole, run in groupby(tokens, key=lambda token: not self._is_cut([token])):
            fragments = list(run)
            if whole:
                parts += [f"<[{token}]>" for token in fragments]
                seen += [True] * len(fragments)
                continue
            if self._is_cut(fragments):
                raise InputError(f"{self.name}: tokens {fragments} are not UTF-8 and cannot be asked for over HTTP")
            parts.append('"' + "".join(f"\\U{ord(letter):08X}" for letter in self._text(fragments)) + '"')
            preferred.update(fragments)
            seen += [not self._is_cut(fragments[: count + 1]) for count in range(len(fragments))]
        return "root ::= " + " ".join(parts), [(token, _PREFERENCE) for token in sorted(preferred)], seen

    def _is_cut(self, tokens: list[int]) -> bool:
        """Whether the bytes of `tokens` begin or end within a character."""
        key = tuple(tokens)
        if key not in self._cut:
            self._cut[key] = "\ufffd" in self._text(tokens)
        return self._cut[key]

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
        done = self._post("/completion", {"prompt": prompt, "cache_prompt": False, **request})
        if not done.get("completion_probabilities"):
            raise ValidationError(f"{self.name}: the server answers without the probabilities it was asked for")
        return done

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
                said = error.read(2000).decode("utf-8", "replace")
            raise ValidationError(f"{request.full_url}: the server says {error.code}: {_message(said)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise MissingResourceError(
                f"{request.full_url}: no llama-server answers there ({reason}); start one with: mode-gguf run MODEL "
                "--mmproj FILE"
            ) from None
        if not isinstance(answer, dict):
            raise InputError(f"{request.full_url}: a JSON object was expected, {type(answer).__name__} found")
        return answer


def _message(said: str) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said.strip()[:200]
