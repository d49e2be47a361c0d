"""A real llama-server, the one inside xllamacpp, beside the same files in this process."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.llama_cpp.http_model import ServerModel, ServerUrl
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.questions import HeldOutSet, load_held_out
from mode_gguf.validation.reference import RunSettings, measure_reference
from mode_gguf.validation.validate import ComparedModels, validate
from tests.validation.conftest import Files

SERVE = Path(__file__).with_name("serve.py")
TEXT = "The quick brown fox doesn't jump: héllo — 你好, 12 naïve dogs."
VOCABULARY = 512
WHOLE = 1e-3
"""KL between single tokens and a batch of them, both with llama.cpp's defaults."""


@contextmanager
def serving(files: Files) -> Iterator[ServerUrl]:
    command = [sys.executable, str(SERVE), str(files.text), str(files.mmproj)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("ADDRESS "))
        yield ServerUrl(line.split()[1])
        process.kill()


@pytest.fixture(scope="module")
def server(small: Files) -> Iterator[ServerUrl]:
    with serving(small) as address:
        yield address


@pytest.fixture(scope="module")
def model(small: Files) -> Iterator[LlamaModel]:
    with LlamaModel(small.text, small.mmproj, context=1024, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def held_out(held_out_folder: Path) -> HeldOutSet:
    return load_held_out(held_out_folder)


def test_what_it_says_of_itself(server: ServerUrl, model: LlamaModel, small: Files) -> None:
    remote = ServerModel(server)
    assert remote.n_vocab == model.n_vocab == VOCABULARY
    assert remote.has_vision
    assert remote.tokenize(TEXT) == model.tokenize(TEXT)
    assert remote.detokenize(model.tokenize(TEXT)) == TEXT
    assert remote.tokenize("<|im_end|>") == model.tokenize("<|im_end|>")
    assert len(remote.tokenize("<|im_end|>", special=False)) > 1
    assert remote.end_of_turn == model.end_of_turn
    assert remote.beginning == model.beginning
    asked = [loaded.chat_template.question("What?", "IMAGE") for loaded in (remote, model)]
    assert asked[0] == asked[1]
    assert "llama-server b" in remote.runtime


def test_text_with_parts_of_characters(server: ServerUrl, model: LlamaModel) -> None:
    """The pico vocabulary has bytes for what it never saw: no grammar takes those, no row comes for them by itself."""
    tokens = model.tokenize(TEXT)
    assert any("\ufffd" in model.detokenize([token]) for token in tokens)
    rows = ServerModel(server).continuation_logits(tokens)
    assert not np.isnan(rows).any()
    scores = compare(model.continuation_logits(tokens), rows, tokens[1:])
    assert len(scores.kl) == len(tokens) - 1
    assert scores.kl.max() < WHOLE


def test_long_texts_go_in_pieces(server: ServerUrl, model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = model.tokenize(TEXT)
    whole = ServerModel(server).continuation_logits(tokens)
    monkeypatch.setattr("mode_gguf.llama_cpp.http_model.ENTRIES_PER_REQUEST", 7 * VOCABULARY)
    pieces = ServerModel(server).continuation_logits(tokens)
    assert compare(whole, pieces, tokens[1:]).kl.max() < WHOLE


def test_answers_about_pictures(server: ServerUrl, model: LlamaModel, picture: Image.Image) -> None:
    remote = ServerModel(server)
    prompt, local = (
        loaded.chat_template.question("Which colour is it?", loaded.image_marker) for loaded in (remote, model)
    )
    answer = [*model.tokenize("The circle is red.", special=False), *model.end_of_turn]
    scores = compare(model.logits(local, answer, picture), remote.logits(prompt, answer, picture), answer)
    assert len(scores.kl) == len(answer)
    assert scores.kl.max() < WHOLE
    assert remote.generate(prompt, picture, max_tokens=6) == model.generate(local, picture, max_tokens=6)
    cut = [*model.tokenize("你 red", special=False), *model.end_of_turn]
    rows = remote.logits(prompt, cut, picture)
    hidden = np.isnan(rows).all(axis=1)
    assert 0 < hidden.sum() < len(cut)
    assert not hidden[-1]
    scores = compare(model.logits(local, cut, picture), rows, cut)
    assert len(scores.kl) == len(cut) - hidden.sum()
    assert scores.kl.max() < WHOLE


def test_candidate_behind_http(
    server: ServerUrl, small: Files, full: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path
) -> None:
    """Whole lists give what the same file gives in this process, shorter ones a range around it."""
    held_out = HeldOutSet("right", held_out.texts, held_out.questions[:2])  # this model's own answers are mostly bytes
    settings = replace(settings, answers="given")
    embedded = validate(
        ComparedModels(small.text, full.text, full.mmproj),
        held_out,
        settings=settings,
        reference_folder=tmp_path / "kept",
    )
    whole = validate(ComparedModels(server, tmp_path / "kept", None), held_out, settings=settings)
    part = validate(
        ComparedModels(server, tmp_path / "kept", None), held_out, settings=replace(settings, top_logprobs=40)
    )
    assert whole.candidate.bpw == pytest.approx(embedded.candidate.bpw, rel=0.05)
    assert "llama-server" in whole.runtime
    assert whole.reference_runtime == embedded.runtime
    assert whole.smoke is None
    for kind in ("text", "image"):
        expected, exact, truncated = (getattr(report, kind) for report in (embedded, whole, part))
        assert exact.positions == truncated.positions == expected.positions
        assert exact.kl_mean == pytest.approx(expected.kl_mean, rel=0.03)
        assert exact.kl_at_most == exact.kl_mean
        assert exact.perplexity == pytest.approx(expected.perplexity, rel=0.01)
        assert truncated.kl_mean < exact.kl_mean < truncated.kl_at_most
        assert truncated.top1_agreement == pytest.approx(exact.top1_agreement)
    assert len(whole.answers) == len(embedded.answers)


def test_reference_behind_http(
    server: ServerUrl, small: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path
) -> None:
    """Lists are stored as lists, and used again."""
    held_out = HeldOutSet("right", held_out.texts, held_out.questions[:2])
    settings = replace(settings, top_logprobs=100, answers="given")
    first = measure_reference(server, None, held_out, tmp_path, settings)
    times = [path.stat().st_mtime_ns for path in first.paths]
    report = validate(
        ComparedModels(small.text, server, small.mmproj), held_out, settings=settings, reference_folder=tmp_path
    )
    assert [path.stat().st_mtime_ns for path in first.paths] == times
    assert (~np.isnan(first.read(0).log_probs)).sum(axis=1).min() == 100
    for divergence in (report.text, report.image):
        assert divergence is not None
        assert divergence.kl_mean is not None
        assert divergence.kl_at_most is not None
        assert divergence.kl_mean < 10 * WHOLE < divergence.kl_at_most
        assert divergence.top1_agreement is not None
        assert divergence.top1_agreement > 0.95


def test_unlisted_tokens_are_reported(
    server: ServerUrl, model: LlamaModel, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path
) -> None:
    """Bytes that are no characters are left out behind a picture, and the report says how many."""
    asked = HeldOutSet("bytes", held_out.texts[:1], held_out.questions[2:])
    assert model.mmproj is not None
    full = validate(ComparedModels(model.text_gguf, None, model.mmproj), asked, settings=settings)
    report = validate(ComparedModels(server), asked, settings=settings)
    assert full.image is not None
    assert full.warnings == ()
    assert report.warnings
    left_out = int(report.warnings[0].split()[0])
    assert left_out + (report.image.positions if report.image else 0) == full.image.positions


def test_what_the_server_refuses(server: ServerUrl, picture: Image.Image) -> None:
    with pytest.raises(InputError, match=r"/completion: the server says 400: .*context"):
        ServerModel(server).generate("fox " * 3000)


def test_nobody_answers() -> None:
    with pytest.raises(MissingResourceError, match=r"127\.0\.0\.1:9/props: no llama-server answers .*mode-gguf run"):
        ServerModel(ServerUrl("http://127.0.0.1:9/"))
