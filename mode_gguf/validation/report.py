"""report.json: measurements of one file in llama.cpp."""

import math
import sys
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from mode_gguf.artifacts import Record, read_record, write_text
from mode_gguf.validation.conversion_record import ConversionRecord
from mode_gguf.validation.divergence import Scores

Z_95: Final = 1.959964


class FileRecord(Record):
    """One GGUF file; `bpw` is all tensor bits over all weights."""

    name: str
    size_bytes: int
    bpw: float
    experts_bpw: float | None


class Divergence(Record):
    """Distances over all scored positions of one kind of answer; those from the reference are None without one.

    Attributes:
        kl_mean: nats per scored token, full vocabulary, from the reference to the candidate.
        kl_mean_error: standard error of that mean over positions.
        kl_p99, kl_p99_9: 99th and 99.9th percentile over positions.
        kl_at_most, kl_p99_at_most, kl_p99_9_at_most: the same where all that a server did not list is counted for as
            much as it can be (`divergence.LEAST_LOG_PROB`); equal to the former where everything is known.
        top1_agreement: share of positions where both would pick the same token.
        perplexity: of the scored tokens; for answers the reference chose itself, of those.
    """

    positions: int
    kl_mean: float | None
    kl_mean_error: float | None
    kl_p99: float | None
    kl_p99_9: float | None
    top1_agreement: float | None
    perplexity: float
    reference_perplexity: float | None
    kl_at_most: float | None = None
    kl_p99_at_most: float | None = None
    kl_p99_9_at_most: float | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether part of the KL is unknown, so that `kl_at_most` says more than `kl_mean`."""
        return self.kl_mean is not None and self.kl_at_most is not None and self.kl_at_most > self.kl_mean

    @staticmethod
    def of(scores: Scores, *, with_reference: bool) -> "Divergence":
        kl, at_most = scores.kl, scores.kl + scores.hidden
        return Divergence(
            positions=len(kl),
            kl_mean=float(kl.mean()) if with_reference else None,
            kl_mean_error=float(kl.std() / np.sqrt(len(kl))) if with_reference else None,
            kl_p99=float(np.percentile(kl, 99)) if with_reference else None,
            kl_p99_9=float(np.percentile(kl, 99.9)) if with_reference else None,
            top1_agreement=float(scores.same_top1.mean()) if with_reference else None,
            perplexity=_perplexity(scores.nll),
            reference_perplexity=_perplexity(scores.reference_nll) if with_reference else None,
            kl_at_most=float(at_most.mean()) if with_reference else None,
            kl_p99_at_most=float(np.percentile(at_most, 99)) if with_reference else None,
            kl_p99_9_at_most=float(np.percentile(at_most, 99.9)) if with_reference else None,
        )


def _perplexity(nll: np.ndarray) -> float:
    """exp of the mean; the largest number there is where that overflows, as of a model that is sure and wrong."""
    with np.errstate(over="ignore"):
        return min(float(np.exp(nll.mean())), sys.float_info.max)


class Accuracy(Record):
    """Share of right greedy answers with a 95 % Wilson interval."""

    right: int
    asked: int
    share: float
    low: float
    high: float

    @staticmethod
    def of(right: int, asked: int) -> "Accuracy":
        """With Wilson's score interval (E. B. Wilson, 1927): sensible for few questions and for all right, too."""
        share = right / asked
        scale = 1 + Z_95**2 / asked
        centre = (share + Z_95**2 / (2 * asked)) / scale
        half = Z_95 / scale * math.sqrt(share * (1 - share) / asked + Z_95**2 / (4 * asked**2))
        low = 0.0 if right == 0 else centre - half
        high = 1.0 if right == asked else centre + half
        return Accuracy(right=right, asked=asked, share=share, low=low, high=high)


class Answer(Record):
    """One question about an image, and the models' answers."""

    image: str
    kind: str
    question: str
    expected: str | None
    answer: str
    right: bool | None
    reference_answer: str | None


class Smoke(Record):
    """The answer of the smoke test, and the runtime."""

    runtime: str
    question: str
    answer: str
    seconds: float


class Check(Record):
    """A limit that was given on the command line, and the measured value; `kept` is the verdict."""

    option: str
    limit: float
    found: float
    kept: bool


class ProbeDistance(Record):
    """Distance of predictions behind a few prompts from those of transformers, in nats; its median is the largest of a
    prompt."""

    positions: int
    kl_median: float
    kl_mean: float
    top1_agreement: float


class AgainstTransformers(Record):
    """The exported files beside the checkpoint in transformers, before anything was judged by them.

    Attributes:
        file: that was run: the full-precision one, or the candidate where that one was not made.
        dtype: that transformers computed in.
        kl_bound: largest median KL of a prompt that counts as the same model; None where predictions were not compared.
        tokens: number of tokens that both tokenizers make of the prompts.
        chat_template: whether both write chats alike; False for a model without a template.
        text, image: behind texts, and behind a question about a picture; None where not compared.
        warnings: differences of what a base GGUF has brought.
    """

    file: str
    dtype: str
    kl_bound: float | None
    tokens: int
    chat_template: bool
    text: ProbeDistance | None
    image: ProbeDistance | None
    warnings: tuple[str, ...] = ()


class ValidationReport(Record):
    """Everything `validate` found; `accuracy` is by kind, and over everything under `all`.

    `runtime` ran the candidate, `reference_runtime` the reference. `scored_answers` says which answers about pictures
    `image` is about: the reference's own (`reference`), or the right ones of the questions (`given`). `settings` is how
    models were run (`reference.RunSettings`), `checks` are the limits that were given.
    `warnings` are what calibration could not see (`calibration/coverage.py`), where the file was converted just now;
    `conversion` is how it was made, where that is known; `transformers` is the check of the export by the checkpoint in
    transformers, where calibration ran it.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    runtime: str
    held_out: str
    candidate: FileRecord
    mmproj: FileRecord | None
    reference: FileRecord | None
    text: Divergence | None
    image: Divergence | None
    accuracy: dict[str, Accuracy]
    reference_accuracy: dict[str, Accuracy]
    answers: list[Answer]
    smoke: Smoke | None
    seconds: dict[str, float]
    warnings: tuple[str, ...] = ()
    reference_runtime: str | None = None
    scored_answers: Literal["reference", "given"] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    conversion: ConversionRecord | None = None
    transformers: AgainstTransformers | None = None

    @property
    def divergences(self) -> dict[str, Divergence]:
        """The measured parts, `text` and `image`."""
        return {name: part for name, part in (("text", self.text), ("image", self.image)) if part}

    @property
    def example(self) -> Answer | None:
        """A question to show, preferably one that asks for a description."""
        return min(self.answers, key=lambda answer: answer.expected is not None, default=None)

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "ValidationReport":
        """Read a report.

        Raises:
            InputError: not there, not JSON, or of another form.
        """
        return read_record(path, ValidationReport, "report")
