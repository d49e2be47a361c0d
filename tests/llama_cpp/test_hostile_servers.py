"""`validate` against servers that are none, are broken, or mean harm: one line, exit code 4, little time and memory."""

import gzip
import itertools
import json
import math
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp import http_model, server_client
from mode_gguf.llama_cpp.server_client import AnswerLimits
from mode_gguf.validation.questions import HeldOutSet, load_held_out
from mode_gguf.validation.reference import RunSettings
from mode_gguf.validation.validate import ComparedModels, validate
from tests.e2e.conftest import Ended, Run, ended, run
from tests.llama_cpp.fake_server import FakeServer, Handler, fake_server

__all__ = ["ended", "run"]

GROWTH = 200 * 1024
"""Of this process, in KiB: an endless answer would be gigabytes."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    Image.new("RGB", (32, 32), "red").save(folder / "0.png")
    (folder / "text.jsonl").write_text(json.dumps({"text": "a fox"}) + "\n")
    question = {"image": "0.png", "question": "Which colour?", "answer": "red"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ABOUT", "WORDS", "COMPLETION"):
        limits = getattr(http_model, name)
        monkeypatch.setattr(http_model, name, AnswerLimits(1.5, limits.n_bytes))


Refused = Callable[..., str]


@pytest.fixture
def refused(fake: FakeServer, held: Path, tmp_path: Path, run: Run) -> Refused:
    """The one error line of a validation that ends with code 4, soon, without much memory and without a report."""

    def refused(in_answer: str = fake.url) -> str:
        report, started = tmp_path / "report.json", time.monotonic()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = run("validate", fake.url, "--samples", held, "--report", report, code=4)
        assert time.monotonic() - started < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
        assert not report.exists()
        assert line.isprintable()
        assert len(line) < 800
        assert in_answer in line
        return line

    return refused


def test_a_good_one(fake: FakeServer, held: Path, tmp_path: Path, run: Run) -> None:
    report = tmp_path / "report.json"
    run("validate", fake.url, "--samples", held, "--report", report)
    found = json.loads(report.read_text())
    assert found["candidate"] == {"name": "fake", "size_bytes": 1000, "bpw": 8.0, "experts_bpw": None}
    assert found["text"]["perplexity"] == pytest.approx(256)
    assert found["accuracy"]["all"]["right"] == 1
    assert {path for path, _ in fake.seen} == {"/props", "/v1/models", "/tokenize", "/detokenize", "/completion"}


def changing(path: str, *keys: str | int, to: Any) -> Callable[[str, Any], Any]:
    """An answer of `path` that is `to`, or holds it below `keys`; `to` may be a function of what was there."""

    def changed(asked: str, answer: Any) -> Any:
        if asked != path or (keys and keys[0] not in answer):
            return answer
        if not keys:
            return to
        place = answer
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to
        return answer

    return changed


META = ("/v1/models", "data", 0, "meta")
ROW = ("/completion", "completion_probabilities", 0)
BROKEN: dict[str, tuple[tuple[Any, ...], Any]] = {
    "html": (("/props",), b"<html>hi</html>"),
    "empty": (("/props",), b""),
    "list": (("/props",), [1]),
    "null": (("/props",), None),
    "no-json-to-the-end": (("/props",), b'{"model_alias": "x'),
    "not-utf-8": (("/props",), b'{"model_alias": "\xff"}'),
    "half-a-character": (("/props",), b'{"model_alias": "\\ud800"}'),
    "deep": (("/props",), b'{"a":' * 100_000),
    "deep-lists": (("/props",), b"[" * 1_000_000),
    "props-missing": (("/props",), {}),
    "alias-no-text": (("/props", "model_alias"), 5),
    "template-no-text": (("/props", "chat_template"), None),
    "vision-no-truth": (("/props", "modalities"), {"vision": "yes"}),
    "modalities-a-list": (("/props", "modalities"), [1]),
    "marker-empty": (("/props", "media_marker"), ""),
    "marker-a-number": (("/props", "media_marker"), 1),
    "eos-a-list": (("/props", "eos_token"), ["x"]),
    "eos-long": (("/props", "eos_token"), "x" * 5000),
    "models-a-list": (("/v1/models",), [1]),
    "no-models": (("/v1/models", "data"), []),
    "models-null": (("/v1/models", "data"), None),
    "no-meta": (("/v1/models", "data", 0), {}),
    "vocabulary-large": ((*META, "n_vocab"), 2**40),
    "vocabulary-huge": ((*META, "n_vocab"), 10**400),
    "vocabulary-digits": (("/v1/models",), b'{"data": [{"meta": {"n_vocab": ' + b"9" * 5000 + b"}}]}"),
    "vocabulary-negative": ((*META, "n_vocab"), -5),
    "vocabulary-zero": ((*META, "n_vocab"), 0),
    "vocabulary-one": ((*META, "n_vocab"), 1),
    "vocabulary-text": ((*META, "n_vocab"), "256"),
    "vocabulary-fraction": ((*META, "n_vocab"), 256.5),
    "vocabulary-true": ((*META, "n_vocab"), True),
    "size-negative": ((*META, "size"), -1),
    "size-zero": ((*META, "size"), 0),
    "size-infinite": ((*META, "size"), math.inf),
    "weights-zero": ((*META, "n_params"), 0),
    "weights-nan": ((*META, "n_params"), math.nan),
    "no-tokens": (("/tokenize",), {}),
    "empty-tokens": (("/tokenize", "tokens"), []),
    "text-tokens": (("/tokenize", "tokens"), ["a"]),
    "large-tokens": (("/tokenize", "tokens"), lambda tokens: [10**9] * len(tokens)),
    "unknown-tokens": (("/tokenize", "tokens"), lambda tokens: [256] * len(tokens)),
    "negative-tokens": (("/tokenize", "tokens"), lambda tokens: [-5] * len(tokens)),
    "fraction-tokens": (("/tokenize", "tokens"), lambda tokens: [1.5] * len(tokens)),
    "many-tokens": (("/tokenize", "tokens"), [1] * 20_000),
    "tokens-an-object": (("/tokenize", "tokens"), {"0": 1}),
    "no-text": (("/detokenize",), {}),
    "text-null": (("/detokenize", "content"), None),
    "text-large": (("/detokenize", "content"), "x" * 5_000_000),
    "completion-a-list": (("/completion",), []),
    "no-rows": (("/completion", "completion_probabilities"), None),
    "rows-empty": (("/completion", "completion_probabilities"), []),
    "rows-more": (("/completion", "completion_probabilities"), lambda rows: rows * 2),
    "row-a-number": (ROW, 5),
    "row-of-another-token": ((*ROW, "id"), 99),
    "row-of-no-token": ((*ROW, "id"), -1),
    "row-likely": ((*ROW, "logprob"), 50.0),
    "row-likely-a-little": ((*ROW, "logprob"), 0.01),
    "row-text": ((*ROW, "logprob"), "x"),
    "row-nan": ((*ROW, "logprob"), math.nan),
    "row-infinite": ((*ROW, "logprob"), -math.inf),
    "row-least": ((*ROW, "logprob"), -1e300),
    "list-missing": (ROW, {"id": 97, "logprob": -1.0}),
    "list-null": ((*ROW, "top_logprobs"), None),
    "list-of-unknown": ((*ROW, "top_logprobs"), [{"id": 256, "logprob": -1.0}]),
    "list-of-large": ((*ROW, "top_logprobs"), [{"id": 10**6, "logprob": -1.0}]),
    "list-of-huge": ((*ROW, "top_logprobs"), [{"id": 10**30, "logprob": -1.0}]),
    "list-of-negative": ((*ROW, "top_logprobs"), [{"id": -1, "logprob": -1.0}]),
    "list-of-likely": ((*ROW, "top_logprobs"), [{"id": 1, "logprob": 1.0}]),
    "list-of-numbers": ((*ROW, "top_logprobs"), [1, 2]),
    "list-of-nothing-known": ((*ROW, "top_logprobs"), [{}]),
    "answer-empty": (("/completion", "tokens"), []),
    "answer-text": (("/completion", "tokens"), ["x"]),
    "answer-unknown": (("/completion", "tokens"), [256]),
    "answer-negative": (("/completion", "tokens"), [-1]),
    "answer-long": (("/completion", "tokens"), [65] * 10_000),
    "answer-ends-oddly": (("/completion", "stop_type"), {"a": 1}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_answers_without_their_form(name: str, fake: FakeServer, refused: Refused) -> None:
    (path, *keys), to = BROKEN[name]
    fake.changed = changing(path, *keys, to=to)
    refused()


def test_a_model_that_computes_no_numbers(fake: FakeServer, held: Path, tmp_path: Path, run: Run) -> None:
    """llama-server writes null where a logarithm is no number: that is the model's fault, and validation failed."""
    fake.changed = changing(*ROW, "logprob", to=None)
    line = run("validate", fake.url, "--samples", held, "--report", tmp_path / "report.json", code=5)
    assert "are no numbers" in line


def endless(handler: Handler) -> None:
    handler.begin()
    handler.wfile.write(b'{"a":"')
    while True:
        handler.wfile.write(b"a" * (1 << 20))


def chunked(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.begin(Transfer_Encoding="chunked")
    while True:
        handler.wfile.write(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")


def drip(handler: Handler) -> None:
    handler.begin()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.2)


def dripped_head(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"a")
        time.sleep(0.2)


def continued(handler: Handler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


def large_head(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X: " + b"a" * 100_000 + b"\r\n")


def silent(handler: Handler) -> None:
    with suppress(OSError):
        handler.rfile.read()
    time.sleep(3)


def closed(handler: Handler) -> None:
    handler.close_connection = True


def reset(handler: Handler) -> None:
    handler.begin(Content_Length="100")
    handler.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def bomb(handler: Handler) -> None:
    handler.reply(gzip.compress(b" " * (1 << 26)), Content_Encoding="gzip")


def short(handler: Handler) -> None:
    handler.begin(Content_Length="1000")
    handler.wfile.write(b"{}")
    handler.close_connection = True


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n" * 3)
    handler.close_connection = True


def lengths_that_differ(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n{}")


def length_of_letters(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}")


def error_page(handler: Handler) -> None:
    handler.reply(b"<html>\x1b[31m\r\nerror: fake</html>" * 1000, 500)


def endless_error(handler: Handler) -> None:
    handler.begin(503)
    while True:
        handler.wfile.write(b"a" * (1 << 20))


def deep_error(handler: Handler) -> None:
    handler.reply(b"[" * 4000, 500)


def nothing_there(handler: Handler) -> None:
    handler.reply({"error": {"message": ["File", "Not\nFound"]}}, 404)


def no_content(handler: Handler) -> None:
    handler.begin(204)


TRANSPORT: dict[Callable[[Handler], None], str] = {
    endless: "more than",
    chunked: "more than",
    drip: "or not to the end",
    dripped_head: "or not to the end",
    continued: "or not to the end",
    large_head: "no llama-server answers there",
    silent: "or not to the end",
    closed: "no llama-server answers there",
    reset: "no llama-server answers there",
    bomb: "compressed (gzip)",
    short: "no llama-server answers there",
    no_http: "no llama-server answers there",
    lengths_that_differ: "no llama-server answers there",
    length_of_letters: "no llama-server answers there",
    error_page: "the server says 500: <html>",
    endless_error: "the server says 503: aaa",
    deep_error: "the server says 500: [[[",
    nothing_there: "the server says 404: ['File'",
    no_content: "the server says 204",
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("path", ["/props", "/completion"])
@pytest.mark.parametrize("way", TRANSPORT, ids=lambda way: way.__name__)
def test_transport(way: Callable[[Handler], None], path: str, fake: FakeServer, refused: Refused) -> None:
    fake.raw[path] = way
    line = refused()
    assert TRANSPORT[way] in line
    assert f"{fake.url}{path}" in line


def test_an_answer_that_has_begun_comes_soon(
    fake: FakeServer, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion may take a quarter of an hour to begin, and no time from there on."""
    monkeypatch.setattr(server_client, "BODY_SECONDS", -16.0)
    fake.raw["/completion"] = drip
    assert "or not to the end" in refused()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/props", "/tokenize"])
def test_the_key_goes_to_the_address_alone(
    path: str, status: int, fake: FakeServer, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "sekret")
    with fake_server() as other:
        for place in (f"{other.url}/x", "file:///etc/passwd", f"//{other.url[7:]}", "/x"):
            fake.raw[path] = lambda handler, place=place: handler.reply(b"", status, Location=place)  # type: ignore[misc]
            line = refused()
            assert f"sends to {place} ({status}), which is not followed" in line
            assert "sekret" not in line
        assert other.seen == []
    assert {key for _, key in fake.seen} == {"Bearer sekret"}
    assert "/x" not in {asked for asked, _ in fake.seen}


def test_a_key_that_is_not_accepted(fake: FakeServer, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = {"error": {"message": "Invalid API Key", "code": 401}}
    fake.raw["/props"] = lambda handler: handler.reply(refusal, 401)
    assert refused().endswith("/props: the server says 401: Invalid API Key; give its key in LLAMA_API_KEY")
    for key in ("über", "a\nb", "a\x1bb"):
        monkeypatch.setenv("LLAMA_API_KEY", key)
        assert "LLAMA_API_KEY: holds more than printable ASCII characters" in refused(in_answer="")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_is_asked_about_this_machine(
    name: str, held: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_server() as fake, fake_server() as proxy:
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("REQUEST_METHOD", raising=False)
        monkeypatch.setenv(name, proxy.url)
        for host in ("127.0.0.1", "localhost", "127.1"):
            url = fake.url.replace("127.0.0.1", host)
            run("validate", url, "--samples", held, "--report", tmp_path / "report.json")
        assert proxy.seen == []
        proxy.raw = {"http://example.invalid/props": lambda handler: handler.reply(b"", 502)}
        line = run("validate", "http://example.invalid", "--samples", held, "--report", tmp_path / "r.json", code=4)
        assert "the server says 502" in line, "of another machine it is"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://", "is no address of a server"),
        ("http://[::1", "is no address"),
        ("http://127.0.0.1:99999", "is no address"),
        ("http://127.0.0.1:x", "is no address"),
        ("http://127.0.0.1:80/?a=b", "is no address of a server"),
        ("http://me:sekret@127.0.0.1:80", "the address holds a password"),
    ],
)
def test_addresses(address: str, found: str, held: Path, tmp_path: Path, run: Run) -> None:
    line = run("validate", address, "--samples", held, "--report", tmp_path / "r.json", code=2)
    assert found in line
    assert "sekret" not in line


def test_names_cannot_steer_the_terminal(fake: FakeServer, held: Path, tmp_path: Path, ended: Ended) -> None:
    alias = "\x1b[31mevil\r\n<script>\u202e" + "x" * 1000
    fake.changed = changing("/props", "model_alias", to=alias)
    report = tmp_path / "report.json"
    out, _ = ended("validate", fake.url, "--samples", held, "--report", report)
    assert "\x1b" not in out
    name = json.loads(report.read_text())["candidate"]["name"]
    assert name.startswith("\\x1b[31mevil <script>\\u202exx")
    assert len(name) < 250
    page = report.with_suffix(".html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_duplicate_keys_are_read_once(fake: FakeServer, held: Path, tmp_path: Path, run: Run) -> None:
    """The last one counts, and is held against its bounds."""
    meta = b'{"n_vocab": 5, "n_vocab": %d, "size": 1000, "n_params": 1000}'
    fake.changed = changing("/v1/models", to=b'{"data": [{"meta": ' + meta % 256 + b"}]}")
    run("validate", fake.url, "--samples", held, "--report", tmp_path / "report.json")
    fake.changed = changing("/v1/models", to=b'{"data": [{"meta": ' + meta % -1 + b"}]}")
    run("validate", fake.url, "--samples", held, "--report", tmp_path / "report.json", code=4)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-3, 300), max_size=4),
    st.dictionaries(st.sampled_from(["id", "logprob", "tokens", "x"]), st.integers(-3, 300), max_size=3),
)


def places(answer: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Keys of everything in an answer; of a long list the first and last items."""
    yield path
    if isinstance(answer, dict):
        for key in answer:
            yield from places(answer[key], (*path, key))
    elif isinstance(answer, list):
        for index in sorted({0, len(answer) - 1} if answer else ()):
            yield from places(answer[index], (*path, index))


def mutated(answer: Any, chance: random.Random, odd: Any) -> Any:
    """The answer with one thing in it gone, twice there, or `odd`; or cut off."""
    answer = json.loads(json.dumps(answer))
    path, how = chance.choice(list(places(answer))), chance.choice(["odd", "odd", "gone", "twice", "cut"])
    if how == "cut":
        text = json.dumps(answer).encode()
        return text[: chance.randrange(len(text))]
    if not path:
        return odd
    place = answer
    for key in path[:-1]:
        place = place[key]
    if how == "gone":
        del place[path[-1]]
    elif how == "twice" and isinstance(place, list):
        place.append(place[-1])
    else:
        place[path[-1]] = odd
    return answer


@pytest.fixture(scope="module")
def samples(held: Path) -> HeldOutSet:
    return load_held_out(held)


@given(number=st.integers(0, 12), seed=st.integers(0, 2**32), odd=ODD)
@settings(max_examples=150, deadline=None)
def test_mutated_answers(number: int, seed: int, odd: Any, samples: HeldOutSet) -> None:
    """Any change of any answer is either harmless or refused by an error of ours."""
    sent = itertools.count()

    def changed(path: str, answer: Any) -> Any:
        return mutated(answer, random.Random(seed), odd) if next(sent) == number else answer

    with fake_server(changed) as fake, suppress(InputError, ValidationError):
        report = validate(ComparedModels(fake.address), samples, settings=RunSettings(max_answer_tokens=8))
        json.dumps(report.model_dump(mode="json"), allow_nan=False)
