"""Running commands in this process, as a shell would."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf_cli.main import main


def settings(*pairs: str) -> tuple[str, ...]:
    """Options of a recipe on a command line: `section.option=value` each."""
    return tuple(word for pair in pairs for word in ("--set", pair))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """run(*arguments, code=0): a command that must end with `code`; returns its stdout, or its one error line.

    It validates in the embedded llama.cpp: what else a machine has is not what is tested.
    """
    monkeypatch.delenv("MODE_GGUF_LLAMA_CPP", raising=False)

    def run(*arguments: str | Path, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["mode-gguf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert ended.value.code == code, captured.err
        if code == 0:
            return captured.out
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert captured.out == ""
        assert len(errors) == 1, captured.err
        assert "Traceback" not in captured.err
        return errors[0]

    return run
