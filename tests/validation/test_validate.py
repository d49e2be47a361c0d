"""A file against itself, and a quantized file against full precision."""

import json
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.validation import distributions, reference
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.questions import HeldOutSet, Question
from mode_gguf.validation.reference import RunSettings, ScoredSample, measure_reference
from mode_gguf.validation.report import ValidationReport
from mode_gguf.validation.validate import ComparedModels, validate
from tests.validation.conftest import Files


def test_file_against_itself(full: Files, held_out: HeldOutSet, settings: RunSettings) -> None:
    report = validate(ComparedModels(full.text, full.text, full.mmproj), held_out, settings=settings)
    assert set(report.divergences) == {"text", "image"}
    for divergence in report.divergences.values():
        assert divergence.kl_mean is not None
        assert divergence.kl_mean < 1e-12
        assert divergence.top1_agreement == 1
        assert divergence.perplexity == pytest.approx(divergence.reference_perplexity, rel=1e-6)
    assert report.accuracy == report.reference_accuracy
    assert [answer.answer for answer in report.answers] == [answer.reference_answer for answer in report.answers]


def test_quantized_file(full: Files, small: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path) -> None:
    report = validate(ComparedModels(small.text, full.text, small.mmproj, small.types), held_out, settings=settings)
    assert report.text is not None
    assert report.text.kl_mean is not None
    assert report.text.kl_p99 is not None
    assert 1e-4 < report.text.kl_mean < report.text.kl_p99
    assert report.text.positions == sum(min(n, 48) - 1 for n in _token_counts(full, held_out))
    assert report.image is not None
    assert report.image.kl_mean is not None
    assert report.image.kl_mean > 1e-4
    assert set(report.accuracy) == {"all", "colour", "count"}
    assert report.accuracy["all"].asked == 2
    assert report.candidate.experts_bpw == 2.625
    assert report.smoke is not None
    assert report.example is not None
    assert report.example.question == "Describe the picture."
    assert set(report.seconds) == {"structure", "smoke", "reference", "candidate"}
    report.save(tmp_path / "report.json")
    assert ValidationReport.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 1


def _token_counts(full: Files, held_out: HeldOutSet) -> list[int]:
    with LlamaModel(full.text, threads=1) as model:
        return [len(model.tokenize(text)) for text in held_out.texts]


def test_without_reference_or_projector(small: Files, held_out: HeldOutSet, settings: RunSettings) -> None:
    report = validate(ComparedModels(small.text), held_out, settings=settings)
    assert report.text is not None
    assert report.text.kl_mean is None
    assert report.text.perplexity > 1
    assert report.image is None
    assert report.smoke is None
    assert report.accuracy == {}
    assert report.example is None
    with_projector = validate(ComparedModels(small.text, None, small.mmproj), held_out, settings=settings)
    assert with_projector.image is not None
    assert with_projector.answers[0].reference_answer is None


def test_reference_is_measured_once(
    full: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_reference(full.text, full.mmproj, held_out, tmp_path, settings)
    times = [path.stat().st_mtime_ns for path in first.paths]
    (tmp_path / first.paths[1].name).write_bytes(b"cut")
    measured: list[str | Question] = []
    original = reference._measure

    def counted(model: LlamaModel, sample: str | Question, settings: RunSettings) -> ScoredSample:
        measured.append(sample)
        return original(model, sample, settings)

    monkeypatch.setattr(reference, "_measure", counted)
    second = measure_reference(full.text, full.mmproj, held_out, tmp_path, settings)
    assert measured == [held_out.texts[1]]
    assert first == second
    assert [path.stat().st_mtime_ns for path in second.paths][::2] == times[::2]
    measure_reference(
        full.text, full.mmproj, held_out, tmp_path, RunSettings(context=1024, threads=1, max_answer_tokens=5)
    )
    assert len(measured) == 1 + len(first.paths)


def test_distributions_in_16_bits_add_next_to_nothing() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (6, 40_000)).astype(np.float32)
    packed = distributions.pack_distributions(distributions.normalised(logits))
    assert packed["steps"].dtype == np.uint16
    assert compare(distributions.unpack_distributions(packed), logits, [0] * 6).kl.max() < 1e-7


def test_large_vocabularies_are_kept_in_16_bits(
    full: Files, held_out: HeldOutSet, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "FLOAT32_VOCABULARY", 0)
    report = validate(ComparedModels(full.text, full.text, full.mmproj), held_out, settings=settings)
    assert set(report.divergences) == {"text", "image"}
    for divergence in report.divergences.values():
        assert divergence.kl_mean is not None
        assert 0 < divergence.kl_mean < 1e-7


def test_files_of_another_model(full: Files, small: Files, held_out: HeldOutSet, settings: RunSettings) -> None:
    with pytest.raises(ValidationError, match="the plan says F32"):
        validate(ComparedModels(small.text, None, None, full.types), held_out, settings=settings)


def test_too_short_text(full: Files, settings: RunSettings) -> None:
    with pytest.raises(InputError, match="shorter than two tokens"):
        validate(ComparedModels(full.text), HeldOutSet("short", ("a",), ()), settings=settings)


def test_reports_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(InputError, match="cannot be read as a report"):
        ValidationReport.load(path)
    path.write_text('{"schema_version": 2}')
    with pytest.raises(InputError, match="schema_version"):
        ValidationReport.load(path)
