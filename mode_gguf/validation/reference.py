"""The reference model's answers and next-token distributions, computed once and kept on disk for every candidate.

One safetensors file per held-out sample, so that memory holds one sample at a time, a run that was stopped goes on
where it was, and another candidate needs no reference model at all.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from mode_gguf.artifacts import (
    Record,
    file_fingerprint,
    fingerprint,
    read_arrays,
    read_metadata,
    read_record,
    write_arrays,
    write_json,
)
from mode_gguf.errors import InputError
from mode_gguf.gguf.header import read_header
from mode_gguf.llama_cpp.engines import Engine, engine_for
from mode_gguf.llama_cpp.gpu_offload import ON_CPU, Offload
from mode_gguf.llama_cpp.http_model import TOP, ServerModel, ServerUrl
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.llama_cpp.model_protocol import Logits, Model
from mode_gguf.progress import Progress, silent
from mode_gguf.text_prefix import sufficient_prefix
from mode_gguf.validation.distributions import normalised, pack_distributions, unpack_distributions
from mode_gguf.validation.questions import HeldOutSet, Question
from mode_gguf.validation.report import FileRecord
from mode_gguf.validation.structure import experts_bpw

Array: TypeAlias = np.ndarray
ModelSource: TypeAlias = Path | ServerUrl
"""A model: a text GGUF to run in this process, or one behind a llama-server."""

RECORD: Final = "reference.json"
MAX_TEXT_TOKENS: Final = 256
MAX_ANSWER_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Settings of model runs; the same for the reference and its candidates.

    `context`, `threads`, `offload`, `exact` and `engine` are as in `LlamaModel`, `top_logprobs` as in `ServerModel`.

    Attributes:
        answers: which answers about pictures are scored, teacher-forced: the reference's own greedy ones, or the right
            ones that the questions come with, where they do.
    """

    context: int = 4096
    threads: int | None = None
    offload: Offload = field(default=ON_CPU)
    exact: bool = False
    max_text_tokens: int = MAX_TEXT_TOKENS
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    answers: Literal["reference", "given"] = "reference"
    engine: Engine | None = None
    top_logprobs: int = TOP

    def open(self, source: ModelSource, mmproj: Path | None) -> AbstractContextManager[Model]:
        if isinstance(source, ServerUrl):
            return nullcontext(ServerModel(source, self.top_logprobs))
        return self.load(source, mmproj)

    def load(self, model: Path, mmproj: Path | None) -> LlamaModel:
        return LlamaModel(
            model,
            mmproj,
            context=self.context,
            threads=self.threads,
            offload=self.offload,
            exact=self.exact,
            engine=self.engine,
        )

    def distribution_key(self) -> dict[str, Any]:
        """Settings that stored distributions depend on, but for rounding."""
        names = ("context", "exact", "max_text_tokens", "max_answer_tokens", "answers")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """One held-out sample as the reference sees it.

    Attributes:
        tokens: the scored tokens: those of a text after its first, or those of an answer with its end token.
        log_probs: (len(tokens), vocabulary) float32, the reference's log-probability at each of them; NaN where a
            server did not list a token.
        answer: the reference's greedy answer; empty for a text.
    """

    tokens: list[int]
    log_probs: Array
    answer: str


class ReferenceRecord(Record):
    """`reference.json`, beside the distributions: whose they are, so that they can be used without the model.

    Attributes:
        model: of the reference.
        runtime: what ran it.
        text_identity, image_identity: of the text model, and of it with its projector.
    """

    schema_version: Literal[1] = 1
    model: FileRecord
    runtime: str
    text_identity: str
    image_identity: str


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference model's answers and distributions on a held-out set; see `measure_reference`.

    Attributes:
        paths: one per text, then one per question.
    """

    paths: tuple[Path, ...]
    record: ReferenceRecord

    def read(self, index: int) -> ScoredSample:
        arrays, metadata = read_arrays(self.paths[index])
        return ScoredSample(
            [int(token) for token in arrays["tokens"]], unpack_distributions(arrays), metadata["answer"]
        )


def score_text(model: Model, text: str, settings: RunSettings) -> tuple[list[int], Logits]:
    """The scored tokens of a text and the logits that predict them.

    Raises:
        InputError: the text is shorter than two tokens.
    """
    text = sufficient_prefix(text, settings.max_text_tokens, lambda part: len(model.tokenize(part, special=False)))
    tokens = [*model.beginning, *model.tokenize(text, special=False)][: settings.max_text_tokens]
    if len(tokens) < 2:
        raise InputError(f"held-out text {text!r} is shorter than two tokens")
    return tokens[1:], model.continuation_logits(tokens)


def question_prompt(model: Model, question: Question) -> str:
    """The prompt of a question in the model's own chat template."""
    return model.chat_template.question(question.question, model.image_marker)


def scored_answer(model: Model, prompt: str, question: Question, settings: RunSettings) -> list[int]:
    """The answer that is scored: the model's own, or the given one with its end token where `settings` want that."""
    if settings.answers == "reference" or question.answer is None:
        return model.generate(prompt, question.image, max_tokens=settings.max_answer_tokens)
    return [*model.tokenize(question.answer, special=False), *model.end_of_turn]


def greedy_answer(
    model: Model, prompt: str, question: Question, settings: RunSettings, forced: Sequence[int], logits: Logits
) -> str:
    """The greedy answer to a question.

    `logits` were computed with `forced` as the answer: if they would pick just these tokens, up to an end token or as
    many as there may be, then `forced` is the greedy answer and need not be generated.
    """
    tokens = list(forced)
    finished = model.is_end(tokens[-1]) or len(tokens) == settings.max_answer_tokens
    known = not np.isnan(logits).all(axis=-1).any()
    if not (finished and known and np.nanargmax(logits, axis=-1).tolist() == tokens):
        tokens = model.generate(prompt, question.image, max_tokens=settings.max_answer_tokens)
    return model.detokenize(tokens).strip()


def measure_reference(
    source: ModelSource,
    mmproj: Path | None,
    held_out: HeldOutSet,
    folder: Path,
    settings: RunSettings,
    progress: Progress = silent,
) -> Reference:
    """Distributions of the reference at every scored position, and its greedy answers; kept in `folder`.

    Its own greedy answers are what is scored, unless `settings` want the given ones. Files of an earlier run are used
    again if they were made from the same model, sample and settings, by the same version of the runtime; where layers
    are computed does not matter.

    Raises:
        InputError: the reference cannot be used, or a sample does not fit the context.
        ValidationError: llama.cpp fails at the reference.
    """
    if isinstance(source, Path) and settings.engine is None:
        settings = replace(settings, engine=engine_for(source))
    record = _record(source, mmproj, settings)
    paths = _paths(folder, len(held_out.samples))
    with ExitStack() as stack, progress.step("reference", len(held_out.samples)) as advance:
        model: Model | None = None
        for path, sample in zip(paths, held_out.samples, strict=True):
            made_from = _made_from(record, settings, sample)
            if not _is_current(path, made_from):
                if model is None:
                    model = stack.enter_context(settings.open(source, mmproj))
                measured = _measure(model, sample, settings)
                arrays = {"tokens": np.asarray(measured.tokens, np.int32), **pack_distributions(measured.log_probs)}
                write_arrays(path, arrays, {"made_from": made_from, "answer": measured.answer})
            advance(1)
    write_json(folder / RECORD, record.model_dump(mode="json"))
    return Reference(paths, record)


def stored_reference(folder: Path, held_out: HeldOutSet, settings: RunSettings) -> Reference:
    """The reference that `measure_reference` left in `folder`, without the model.

    Raises:
        InputError: there is nothing, or it was measured on other samples or with other settings.
    """
    record = read_record(folder / RECORD, ReferenceRecord, "stored reference")
    paths = _paths(folder, len(held_out.samples))
    for path, sample in zip(paths, held_out.samples, strict=True):
        if not _is_current(path, _made_from(record, settings, sample)):
            origin = "a text" if isinstance(sample, str) else sample.origin
            raise InputError(
                f"{path}: was not measured on {origin} with these settings ({settings.distribution_key()}); give the "
                "samples and options that it was measured with, or the reference model itself"
            )
    return Reference(paths, record)


def _paths(folder: Path, count: int) -> tuple[Path, ...]:
    return tuple(folder / f"reference-{index:05d}.safetensors" for index in range(count))


def _record(source: ModelSource, mmproj: Path | None, settings: RunSettings) -> ReferenceRecord:
    if isinstance(source, ServerUrl):
        model = ServerModel(source, settings.top_logprobs)
        identity = fingerprint(model.identity(), model.listed)
        return ReferenceRecord(
            model=file_record(source), runtime=model.runtime, text_identity=identity, image_identity=identity
        )
    assert settings.engine is not None
    text = _identity(source)
    return ReferenceRecord(
        model=file_record(source),
        runtime=settings.engine.version,
        text_identity=fingerprint(text),
        image_identity=fingerprint(text, _identity(mmproj) if mmproj else None),
    )


def file_record(source: ModelSource) -> FileRecord:
    """Size and bits per weight of a model; None for the experts of a model behind a server.

    Raises:
        InputError: the file is missing or is not GGUF.
    """
    if isinstance(source, ServerUrl):
        model = ServerModel(source)
        bpw = 8 * model.size_bytes / model.n_weights
        return FileRecord(name=model.alias, size_bytes=model.size_bytes, bpw=bpw, experts_bpw=None)
    header = read_header(source)
    return FileRecord(name=source.name, size_bytes=header.size_bytes, bpw=header.bpw, experts_bpw=experts_bpw(header))


def _measure(model: Model, sample: str | Question, settings: RunSettings) -> ScoredSample:
    if isinstance(sample, str):
        tokens, logits = score_text(model, sample, settings)
        return ScoredSample(tokens, normalised(logits), "")
    prompt = question_prompt(model, sample)
    tokens = scored_answer(model, prompt, sample, settings)
    logits = model.logits(prompt, tokens, sample.image)
    if settings.answers == "reference":
        answer = model.detokenize(tokens).strip()
    else:
        answer = greedy_answer(model, prompt, sample, settings, tokens, logits)
    return ScoredSample(tokens, normalised(logits), answer)


def _made_from(record: ReferenceRecord, settings: RunSettings, sample: str | Question) -> str:
    if isinstance(sample, str):
        identity, contents = record.text_identity, sample
    else:
        identity, contents = record.image_identity, fingerprint(_contents(sample))
    return fingerprint(identity, record.runtime, settings.distribution_key(), contents)


def _is_current(path: Path, made_from: str) -> bool:
    try:
        metadata = read_metadata(path)
    except InputError:
        return False  # not there, damaged, or of another schema version: measured again
    return bool(metadata.get("made_from") == made_from)


def _identity(path: Path) -> list[Any]:
    """Identity of a GGUF file without reading its data: its header, sizes and times of change."""
    header = read_header(path)
    stats = [file.stat() for file in header.files]
    tensors = [(info.name, info.type, info.shape, info.offset) for info in header.tensors.values()]
    return [header.metadata, tensors, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]


def _contents(question: Question) -> list[Any]:
    return [file_fingerprint(question.image), question.question, question.answer]
