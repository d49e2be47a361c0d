"""Running commands in this process, as a shell would."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf_cli.main import main

Run = Callable[..., str]
Ended = Callable[..., tuple[str, list[str]]]


def settings(*pairs: str) -> tuple[str, ...]:
    """Options of a recipe on a command line: `section.option=value` each."""
    return tuple(word for pair in pairs for word in ("--set", pair))


def samples(images: int, texts: int) -> tuple[str, ...]:
    """Options for a calibration on so few samples."""
    return ("--image-samples", str(images), "--text-samples", str(texts))


SMALL = (*samples(4, 4), *settings("calibration.seed=1"))
QUICK = (*samples(2, 2), *settings("calibration.seed=1", "sensitivity.packing.mode=exact"), "--preset", "paper")
"""A conversion without a backward pass and a search."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder that a module's first test fills."""
    return tmp_path_factory.mktemp("module") / "work"


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """ended(*arguments, code=0): stdout and error lines of a command that must end with `code`.

    It validates in the embedded llama.cpp: what else a machine has is not what is tested.
    """
    monkeypatch.delenv("MODE_GGUF_LLAMA_CPP", raising=False)

    def ended(*arguments: str | Path, code: int = 0) -> tuple[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["mode-gguf", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        captured = capsys.readouterr()
        assert exited.value.code == code, captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        if code:
            assert len(errors) == 1, captured.err
            assert "Traceback" not in captured.err
        return captured.out, errors

    return ended


@pytest.fixture
def run(ended: Ended) -> Run:
    """run(*arguments, code=0): stdout of a command that must end with `code`, or its one error line and no stdout."""

    def run(*arguments: str | Path, code: int = 0) -> str:
        said, errors = ended(*arguments, code=code)
        if code == 0:
            return said
        assert said == ""
        return errors[0]

    return run
