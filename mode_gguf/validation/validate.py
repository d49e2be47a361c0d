"""Validation of a file in llama.cpp against its reference, on texts and on questions about images."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mode_gguf import __version__
from mode_gguf.errors import InputError, UsageError, ValidationError
from mode_gguf.gguf.header import read_header
from mode_gguf.image_files import file_for_llama_cpp
from mode_gguf.llama_cpp.engines import Engine, engine_for, has_expert_groups
from mode_gguf.llama_cpp.http_model import ServerModel, ServerUrl
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.llama_cpp.installed_tools import LlamaCppTools, find_llama_cpp, smoke_test
from mode_gguf.llama_cpp.model_protocol import Logits, Model
from mode_gguf.options import Limits
from mode_gguf.probes import Probes
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.types import QuantType
from mode_gguf.temporary_folders import LockedFolder
from mode_gguf.validation.against_transformers import compare_with_transformers
from mode_gguf.validation.bounds import ALL_KINDS, check_measurable, checks_of
from mode_gguf.validation.default_held_out import default_held_out
from mode_gguf.validation.divergence import Scores, compare
from mode_gguf.validation.questions import HeldOutSet, Question, is_right
from mode_gguf.validation.reference import (
    ModelSource,
    Reference,
    RunSettings,
    ScoredSample,
    file_record,
    greedy_answer,
    measure_reference,
    question_prompt,
    score_text,
    scored_answer,
    stored_reference,
)
from mode_gguf.validation.report import Accuracy, Answer, Divergence, Smoke, ValidationReport
from mode_gguf.validation.structure import check_structure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ComparedModels:
    """A candidate and the reference it is compared with.

    Attributes:
        candidate: the text model.
        reference: the same model in full precision, or a folder that `measure_reference` filled; None leaves out what
            is measured against it.
        mmproj: the projector of both; without it, questions are left out. Servers have their own.
        planned: type of every tensor of the candidate, when it was made from a plan.
        probes: what transformers makes of the checkpoint that both were made from; with them the reference is checked
            before the candidate is judged by it, or the candidate itself as far as that can be without a reference.
    """

    candidate: ModelSource
    reference: ModelSource | None = None
    mmproj: Path | None = None
    planned: Mapping[str, QuantType] | None = None
    probes: Probes | None = None


def validate(
    compared: ComparedModels,
    held_out: HeldOutSet | None = None,
    *,
    tools: LlamaCppTools | None = None,
    settings: RunSettings | None = None,
    reference_folder: Path | None = None,
    limits: Limits = Limits(),
    progress: Progress = silent,
) -> ValidationReport:
    """Check a file's structure, that it answers in llama.cpp, and how far it is from the reference.

    Files are run in the embedded llama.cpp unless `settings` name another, or all in our own build where one of them
    has one type per expert; what a llama-server has loaded is asked there, and only its answers are judged.

    Args:
        compared: the file, its reference, and the projector of both.
        held_out: samples; by default a small built-in set.
        tools: the user's llama.cpp for the smoke test (`find_llama_cpp`); by default the embedded one. A file with one
            type per expert is tested in our own build.
        settings: how models are run.
        reference_folder: keeps the reference's distributions for the next candidate; by default they are temporary.
        limits: to check; the report says which are kept.

    Raises:
        UsageError: a limit is about something that is not measured, or a file does not run in the chosen engine.
        InputError: a file or sample cannot be used, or candidate and reference have different vocabularies.
        MissingResourceError: no usable llama.cpp, no server answers, or our own build is needed and is not there.
        ValidationError: the candidate is not what was planned, does not load or answer, or computes nonsense; or the
            reference differs from the checkpoint in transformers.
    """
    candidate, reference, mmproj = compared.candidate, compared.reference, compared.mmproj
    held_out = held_out or default_held_out()
    settings = settings or RunSettings()
    stored = isinstance(reference, Path) and reference.is_dir()
    loaded = [path for path in (candidate, None if stored else reference) if isinstance(path, Path)]
    with_images = _has_vision(candidate, mmproj) and (reference is None or stored or _has_vision(reference, mmproj))
    check_measurable(limits, held_out, with_reference=reference is not None, with_images=with_images)
    if not with_images:
        held_out = HeldOutSet(held_out.name, held_out.texts, ())
    if loaded:
        settings = replace(settings, engine=_engine(settings.engine, loaded))
    seconds: dict[str, float] = {}
    smoke = None
    if isinstance(candidate, Path):
        with _timed(seconds, "structure"):
            check_structure(candidate, compared.planned)
            if mmproj:
                check_structure(mmproj)
    against_transformers = None
    if compared.probes and loaded:
        with _timed(seconds, "transformers"):
            against_transformers = compare_with_transformers(
                compared.probes, loaded[-1], mmproj, settings, predictions=reference in loaded
            )
    elif reference and not stored:
        logger.info(
            "the reference was not held against transformers: no calibration has left its predictions beside it"
        )
    if isinstance(candidate, Path) and mmproj and held_out.questions:
        with _timed(seconds, "smoke"), LockedFolder("reference") as pictures:
            smoke_image = file_for_llama_cpp(held_out.questions[0].image, pictures)
            if settings.engine and settings.engine.folder and has_tools(settings.engine.folder):
                tools = find_llama_cpp(settings.engine.folder)
            tools = tools or LlamaCppTools({}, None)
            smoke = smoke_test(candidate, mmproj, smoke_image, tools, threads=settings.threads)
    with ExitStack() as stack:
        measured = None
        with _timed(seconds, "reference"):
            if stored:
                assert isinstance(reference, Path)
                measured = stored_reference(reference, held_out, settings)
            elif reference:
                folder = reference_folder or stack.enter_context(LockedFolder("reference"))
                measured = measure_reference(reference, mmproj, held_out, folder, settings, progress)
        with _timed(seconds, "candidate"), settings.open(candidate, mmproj) as model:
            runtime = _runtime(model, settings)
            if measured and measured.record.runtime != runtime:
                logger.warning(
                    "the reference was run in %s, the candidate in %s: how the two compute differs, too",
                    *(measured.record.runtime, runtime),
                )
            judged = _Candidate(model, measured, settings)
            text, image, answers = _measure_candidate(judged, held_out, progress)
    if measured is None:
        seconds.pop("reference")
    report = ValidationReport(
        tool_version=__version__,
        runtime=runtime,
        held_out=held_out.name,
        candidate=file_record(candidate),
        mmproj=file_record(mmproj) if mmproj and isinstance(candidate, Path) else None,
        reference=measured.record.model if measured else None,
        text=_divergence(text, measured),
        image=_divergence(image, measured),
        accuracy=_accuracy(held_out, [answer.answer for answer in answers]),
        reference_accuracy=_accuracy(held_out, [answer.reference_answer for answer in answers]),
        answers=answers,
        smoke=Smoke(**asdict(smoke)) if smoke else None,
        seconds=seconds,
        reference_runtime=measured.record.runtime if measured else None,
        scored_answers=settings.answers if image else None,
        settings=_settings_record(settings),
        warnings=(
            *(against_transformers.warnings if against_transformers else ()),
            *_warnings(sum(judged.left_out)),
        ),
        transformers=against_transformers,
    )
    return report.model_copy(update={"checks": checks_of(limits, report)})


def _has_vision(source: ModelSource, mmproj: Path | None) -> bool:
    return ServerModel(source).has_vision if isinstance(source, ServerUrl) else mmproj is not None


def _engine(chosen: Engine | None, models: list[Path]) -> Engine:
    """The engine for files in this process.

    Raises:
        UsageError: another one was chosen than a file with one type per expert needs.
    """
    if chosen is None:
        return engine_for(*models)
    for model in models:
        if has_expert_groups(read_header(model).metadata) and chosen != engine_for(model):
            raise UsageError(f"{model}: has one type per expert and runs in our own build alone; leave --library out")
    return chosen


def has_tools(folder: Path) -> bool:
    """Whether llama-mtmd-cli is beside the libraries."""
    try:
        return find_llama_cpp(folder)["llama-mtmd-cli"] is not None
    except InputError:
        return False


def _warnings(left_out: int) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (f"{left_out} tokens of answers were left out: they end within a character, where a server says nothing",)


def _runtime(model: Model, settings: RunSettings) -> str:
    if isinstance(model, ServerModel):
        return model.runtime
    assert settings.engine is not None
    return settings.engine.version


def _settings_record(settings: RunSettings) -> dict[str, Any]:
    """The settings as JSON values of the report; engines have a field of their own."""
    fields = asdict(replace(settings, engine=None))
    del fields["engine"]
    jsonable: dict[str, Any] = json.loads(json.dumps(fields))
    return jsonable


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The loaded candidate beside its reference; samples are numbered as in `Reference`."""

    model: Model
    reference: Reference | None
    settings: RunSettings
    left_out: list[int] = field(default_factory=list)
    """Number of positions of each sample of which a server lists nothing."""

    def score_text(self, index: int, text: str) -> Scores:
        tokens, logits = score_text(self.model, text, self.settings)
        known = self.reference.read(index) if self.reference else None
        if known and known.tokens != tokens:
            raise InputError(f"{self.model.name}: its tokenizer differs from the reference's")
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
        name = self.model.name
        if isinstance(self.model, LlamaModel) and not np.isfinite(logits).all():
            raise ValidationError(f"{name}: llama.cpp computes logits that are not finite numbers")
        if known is None:
            return self._counted(compare(logits, logits, tokens), tokens)
        if known.log_probs.shape[1] != logits.shape[1]:
            raise InputError(
                f"{name}: its vocabulary has {logits.shape[1]} tokens, the reference's {known.log_probs.shape[1]}"
            )
        return self._counted(compare(known.log_probs, logits, tokens), tokens)

    def _counted(self, scores: Scores, tokens: list[int]) -> Scores:
        self.left_out.append(len(tokens) - len(scores.kl))
        return scores


def _measure_candidate(
    candidate: _Candidate, held_out: HeldOutSet, progress: Progress
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
    if not any(len(part.kl) for part in parts):
        return None
    return Divergence.of(Scores.joined(parts), with_reference=reference is not None)


def _accuracy(held_out: HeldOutSet, answers: list[str] | list[str | None]) -> dict[str, Accuracy]:
    hits: dict[str, list[bool]] = {}
    for question, answer in zip(held_out.questions, answers, strict=True):
        if question.answer is None or answer is None:
            continue
        right = is_right(answer, question.answer, question.match)
        for kind in (question.kind, ALL_KINDS):
            hits.setdefault(kind, []).append(right)
    return {kind: Accuracy.of(sum(right), len(right)) for kind, right in sorted(hits.items())}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 3)
