"""The reference model's answers and next-token distributions, computed once and kept on disk for every candidate.

One safetensors file per held-out sample, so that memory holds one sample at a time, a run that was stopped goes on
where it was, and another candidate needs no reference model at all.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from mode_gguf.artifacts import fingerprint, read_arrays, read_metadata, write_arrays
from mode_gguf.errors import InputError
from mode_gguf.gguf_header import read_header
from mode_gguf.progress import Progress, silent
from mode_gguf.validation.divergence import log_softmax
from mode_gguf.validation.engines import Engine, engine_for
from mode_gguf.validation.llama_cpp import LlamaModel, Logits
from mode_gguf.validation.questions import HeldOut, Question

Array: TypeAlias = np.ndarray

MAX_TEXT_TOKENS: Final = 256
MAX_ANSWER_TOKENS: Final = 64
FLOAT32_VOCABULARY: Final = 1 << 15
"""Up to this vocabulary distributions are kept as they are; beyond, in 16 bits."""
NATS_KEPT: Final = 32.0
"""16-bit distributions reach this far below the most likely token, in steps of 0.0005 nats; less likely tokens are
raised to that floor. What this adds to a KL divergence is below 1e-7 nats."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are run; the same for the reference and its candidates.

    `context`, `threads`, `n_gpu_layers`, `exact` and `engine` are as in `LlamaModel`.
    """

    context: int = 4096
    threads: int | None = None
    n_gpu_layers: int = 0
    exact: bool = False
    max_text_tokens: int = MAX_TEXT_TOKENS
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    engine: Engine | None = None

    def open(self, model: Path, mmproj: Path | None) -> LlamaModel:
        return LlamaModel(
            model,
            mmproj,
            context=self.context,
            threads=self.threads,
            n_gpu_layers=self.n_gpu_layers,
            exact=self.exact,
            engine=self.engine,
        )


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """One held-out sample as the reference sees it.

    Attributes:
        tokens: the scored tokens: those of a text after its first, or those of an answer with its end token.
        log_probs: (len(tokens), vocabulary) float32, the reference's log-probability at each of them.
        answer: the reference's greedy answer; empty for a text.
    """

    tokens: list[int]
    log_probs: Array
    answer: str


@dataclass(frozen=True, slots=True)
class Reference:
    """Everything a reference model said about a held-out set; see `measure_reference`."""

    paths: tuple[Path, ...]
    """One per text, then one per question."""

    def read(self, index: int) -> ScoredSample:
        arrays, metadata = read_arrays(self.paths[index])
        return ScoredSample([int(token) for token in arrays["tokens"]], _unpacked(arrays), metadata["answer"])


def text_tokens(model: LlamaModel, text: str, settings: Settings) -> list[int]:
    """The tokens of a held-out text; `tokens[1:]` are scored."""
    return [*model.beginning, *model.tokenize(text, special=False)][: settings.max_text_tokens]


def score_text(model: LlamaModel, text: str, settings: Settings) -> tuple[list[int], Logits]:
    """The scored tokens of a text and the logits that predict them.

    Raises:
        InputError: the text is shorter than two tokens.
    """
    tokens = text_tokens(model, text, settings)
    if len(tokens) < 2:
        raise InputError(f"held-out text {text!r} is shorter than two tokens")
    return tokens[1:], model.text_logits(tokens[:-1])


def question_prompt(model: LlamaModel, question: Question) -> str:
    """The prompt of a question in the model's own chat template."""
    return model.chat_template.question(question.question, model.image_marker)


def scored_answer(model: LlamaModel, prompt: str, question: Question, settings: Settings) -> list[int]:
    """The answer that is scored: the one given, with its end token, or else the model's own."""
    if question.answer is None:
        return model.generate(prompt, question.image, max_tokens=settings.max_answer_tokens)
    return [*model.tokenize(question.answer, special=False), *model.end_of_turn]


def greedy_answer(
    model: LlamaModel, prompt: str, question: Question, settings: Settings, forced: Sequence[int], logits: Logits
) -> str:
    """The greedy answer to a question.

    `logits` were computed with `forced` as the answer: if they would pick just these tokens, up to an end token, then
    `forced` is the greedy answer and need not be generated.
    """
    tokens = list(forced)
    if not (model.is_end(tokens[-1]) and logits.argmax(axis=-1).tolist() == tokens):
        tokens = model.generate(prompt, question.image, max_tokens=settings.max_answer_tokens)
    return model.detokenize(tokens).strip()


def measure_reference(
    model_path: Path,
    mmproj: Path | None,
    held_out: HeldOut,
    folder: Path,
    settings: Settings,
    progress: Progress = silent,
) -> Reference:
    """Distributions of the reference at every scored position, and its greedy answers; kept in `folder`.

    A question's given answer is what is scored; one without an answer is scored on the reference's own greedy answer.
    Files of an earlier run are used again if they were made from the same model, sample and settings, by the same
    version of the engine.

    Raises:
        InputError: the reference cannot be used, or a sample does not fit the context.
        ValidationError: llama.cpp fails at the reference.
    """
    identity = [_identity(path) for path in (model_path, mmproj) if path]
    engine = settings.engine or engine_for(model_path)
    options = {key: value for key, value in asdict(settings).items() if key not in ("threads", "engine")}
    options["engine"] = engine.version
    samples: list[str | Question] = [*held_out.texts, *held_out.questions]
    paths = []
    with ExitStack() as stack, progress.step("reference", len(samples)) as advance:
        model: LlamaModel | None = None
        for index, sample in enumerate(samples):
            path = folder / f"reference-{index:05d}.safetensors"
            made_from = fingerprint(identity, options, sample if isinstance(sample, str) else _contents(sample))
            if not _is_current(path, made_from):
                if model is None:
                    model = stack.enter_context(replace(settings, engine=engine).open(model_path, mmproj))
                measured = _measure(model, sample, settings)
                arrays = {"tokens": np.asarray(measured.tokens, np.int32), **_packed(measured.log_probs)}
                write_arrays(path, arrays, {"made_from": made_from, "answer": measured.answer})
            paths.append(path)
            advance(1)
    return Reference(tuple(paths))


def _measure(model: LlamaModel, sample: str | Question, settings: Settings) -> ScoredSample:
    if isinstance(sample, str):
        tokens, logits = score_text(model, sample, settings)
        return ScoredSample(tokens, _log_probs(logits), "")
    prompt = question_prompt(model, sample)
    tokens = scored_answer(model, prompt, sample, settings)
    logits = model.logits(prompt, tokens, sample.image)
    return ScoredSample(tokens, _log_probs(logits), greedy_answer(model, prompt, sample, settings, tokens, logits))


def _log_probs(logits: Logits) -> Array:
    return np.concatenate([log_softmax(row[None]).astype(np.float32) for row in logits])


def _packed(log_probs: Array) -> dict[str, Array]:
    """What is stored of (n, vocabulary) log-probabilities."""
    if log_probs.shape[1] <= FLOAT32_VOCABULARY:
        return {"log_probs": log_probs}
    top = log_probs.max(axis=1, keepdims=True)
    steps = np.rint(np.clip((top - log_probs) * (65535 / NATS_KEPT), 0, 65535)).astype(np.uint16)
    return {"top": top, "steps": steps}


def _unpacked(arrays: dict[str, Array]) -> Array:
    if "log_probs" in arrays:
        return arrays["log_probs"]
    unpacked: Array = arrays["top"] - arrays["steps"] * np.float32(NATS_KEPT / 65535)
    return unpacked


def _is_current(path: Path, made_from: str) -> bool:
    try:
        metadata = read_metadata(path)
    except InputError:
        return False  # not there, damaged, or of another schema version: measured again
    return bool(metadata.get("made_from") == made_from)


def _identity(path: Path) -> list[Any]:
    """What tells a GGUF file from another without reading gigabytes: its header, sizes and times of change."""
    header = read_header(path)
    stats = [file.stat() for file in header.files]
    tensors = [(info.name, info.type, info.shape, info.offset) for info in header.tensors.values()]
    return [header.metadata, tensors, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]


def _contents(question: Question) -> list[Any]:
    stat = question.image.stat()
    return [str(question.image.resolve()), stat.st_size, stat.st_mtime_ns, question.question, question.answer]
