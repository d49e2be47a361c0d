"""Judges a finished file in real llama.cpp against its reference, on texts and on questions about pictures."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mode_gguf import __version__
from mode_gguf.errors import InputError, ValidationError
from mode_gguf.gguf_header import GgufHeader, read_header
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.types import QuantType
from mode_gguf.validation.default_set import default_held_out
from mode_gguf.validation.divergence import Scores, compare
from mode_gguf.validation.engines import engine_for
from mode_gguf.validation.llama_cpp import LlamaModel, Logits
from mode_gguf.validation.questions import HeldOut, Question, is_right, wilson_interval
from mode_gguf.validation.reference import (
    Reference,
    ScoredSample,
    Settings,
    greedy_answer,
    measure_reference,
    question_prompt,
    score_text,
    scored_answer,
)
from mode_gguf.validation.report import Accuracy, Answer, Divergence, FileFacts, Smoke, ValidationReport
from mode_gguf.validation.runtimes import LlamaCppTools, find_llama_cpp, smoke_test
from mode_gguf.validation.structure import check_structure, experts_bpw

ALL_KINDS = "all"


def validate(
    candidate: Path,
    reference: Path | None,
    mmproj: Path | None,
    held_out: HeldOut | None = None,
    *,
    planned: Mapping[str, QuantType] | None = None,
    tools: LlamaCppTools | None = None,
    settings: Settings | None = None,
    reference_folder: Path | None = None,
    progress: Progress = silent,
) -> ValidationReport:
    """Check a file's structure, that it answers in llama.cpp, and how far it is from the reference.

    Both are run in the embedded llama.cpp, or both in our own build where one of them has one type per expert.

    Args:
        candidate: the text model.
        reference: the same model in full precision; None leaves out what is measured against it.
        mmproj: the projector of both; without it, questions are left out.
        held_out: samples; by default a small built-in set.
        planned: type of every tensor of the candidate, when it was made from a plan.
        tools: the user's llama.cpp for the smoke test (`find_llama_cpp`); by default the embedded one. A file with one
            type per expert is tested in our own build.
        settings: how models are run.
        reference_folder: keeps the reference's distributions for the next candidate; by default they are temporary.

    Raises:
        InputError: a file or sample cannot be used, or candidate and reference have different vocabularies.
        MissingResourceError: no usable llama.cpp, or our own build is needed and is not there.
        ValidationError: the candidate is not what was planned, does not load or answer, or computes nonsense.
    """
    held_out = held_out or default_held_out()
    settings = settings or Settings()
    engine = settings.engine or engine_for(*filter(None, (candidate, reference)))
    settings = replace(settings, engine=engine)
    if mmproj is None:
        held_out = HeldOut(held_out.name, held_out.texts, ())
    seconds: dict[str, float] = {}
    with _timed(seconds, "structure"):
        header = check_structure(candidate, planned)
        mmproj_header = check_structure(mmproj) if mmproj else None
    smoke = None
    if mmproj and held_out.questions:
        with _timed(seconds, "smoke"):
            picture = held_out.questions[0].image
            if engine.folder:
                tools = find_llama_cpp(engine.folder)
            tools = tools or LlamaCppTools({}, None)
            smoke = smoke_test(candidate, mmproj, picture, tools, threads=settings.threads)
    with ExitStack() as stack:
        measured = None
        if reference:
            folder = reference_folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with _timed(seconds, "reference"):
                measured = measure_reference(reference, mmproj, held_out, folder, settings, progress)
        with _timed(seconds, "candidate"), settings.open(candidate, mmproj) as model:
            text, image, answers = _measure_candidate(_Candidate(model, measured, settings), held_out, progress)
    return ValidationReport(
        tool_version=__version__,
        runtime=engine.version,
        held_out=held_out.name,
        candidate=_facts(candidate, header),
        mmproj=_facts(mmproj, mmproj_header) if mmproj and mmproj_header else None,
        reference=_facts(reference, read_header(reference)) if reference else None,
        text=_divergence(text, measured),
        image=_divergence(image, measured),
        accuracy=_accuracy(held_out, [answer.answer for answer in answers]),
        reference_accuracy=_accuracy(held_out, [answer.reference_answer for answer in answers]),
        answers=answers,
        smoke=Smoke.of(smoke) if smoke else None,
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The candidate, loaded, beside what the reference said; samples are numbered as in `Reference`."""

    model: LlamaModel
    reference: Reference | None
    settings: Settings

    def score_text(self, index: int, text: str) -> Scores:
        tokens, logits = score_text(self.model, text, self.settings)
        known = self.reference.read(index) if self.reference else None
        if known and known.tokens != tokens:
            raise InputError(f"{self.model.text_gguf}: its tokenizer differs from the reference's")
        return self._compare(known, logits, tokens)

    def ask(self, index: int, question: Question) -> tuple[Scores, Answer]:
        known = self.reference.read(index) if self.reference else None
        prompt = question_prompt(self.model, question)
        tokens = known.tokens if known else scored_answer(self.model, prompt, question, self.settings)
        logits = self.model.logits(prompt, tokens, question.image)
        answer = greedy_answer(self.model, prompt, question, self.settings, tokens, logits)
        return self._compare(known, logits, tokens), Answer(
            image=question.image.name,
            kind=question.kind,
            question=question.question,
            expected=question.answer,
            answer=answer,
            right=is_right(answer, question.answer, question.match) if question.answer else None,
            reference_answer=known.answer if known else None,
        )

    def _compare(self, known: ScoredSample | None, logits: Logits, tokens: list[int]) -> Scores:
        name = self.model.text_gguf
        if not np.isfinite(logits).all():
            raise ValidationError(f"{name}: llama.cpp computes logits that are not finite numbers")
        if known is None:
            return compare(logits, logits, tokens)
        if known.log_probs.shape[1] != logits.shape[1]:
            raise InputError(
                f"{name}: its vocabulary has {logits.shape[1]} tokens, the reference's {known.log_probs.shape[1]}"
            )
        return compare(known.log_probs, logits, tokens)


def _measure_candidate(
    candidate: _Candidate, held_out: HeldOut, progress: Progress
) -> tuple[list[Scores], list[Scores], list[Answer]]:
    """Scores of the texts, scores of the answers, and the answers themselves."""
    n_texts = len(held_out.texts)
    text, image, answers = [], [], []
    with progress.step("candidate", n_texts + len(held_out.questions)) as advance:
        for index, sample in enumerate(held_out.texts):
            text.append(candidate.score_text(index, sample))
            advance(1)
        for index, question in enumerate(held_out.questions, start=n_texts):
            scores, answer = candidate.ask(index, question)
            image.append(scores)
            answers.append(answer)
            advance(1)
    return text, image, answers


def _divergence(parts: list[Scores], reference: Reference | None) -> Divergence | None:
    return Divergence.of(Scores.joined(parts), with_reference=reference is not None) if parts else None


def _accuracy(held_out: HeldOut, answers: list[str] | list[str | None]) -> dict[str, Accuracy]:
    hits: dict[str, list[bool]] = {}
    for question, answer in zip(held_out.questions, answers, strict=True):
        if question.answer is None or answer is None:
            continue
        right = is_right(answer, question.answer, question.match)
        for kind in (question.kind, ALL_KINDS):
            hits.setdefault(kind, []).append(right)
    return {kind: Accuracy.of(wilson_interval(sum(right), len(right))) for kind, right in sorted(hits.items())}


def _facts(path: Path, header: GgufHeader) -> FileFacts:
    return FileFacts(name=path.name, size_bytes=header.size_bytes, bpw=header.bpw, experts_bpw=experts_bpw(header))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 3)
