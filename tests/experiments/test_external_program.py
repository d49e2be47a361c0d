"""Programs that succeed, fail and are watched."""

import sys
from pathlib import Path

import pytest

from external_program import run_program, watched

SAY = "import os, sys; print(os.environ['SPOKEN_WORD'], *sys.argv[1:]); print('aside', file=sys.stderr)"
FILL = "import sys, time; filled = bytearray(b'x') * (64 << 20); time.sleep(0.3); sys.exit(int(sys.argv[1]))"


def test_what_a_program_says(tmp_path: Path) -> None:
    done = run_program(sys.executable, "-c", SAY, tmp_path, 2, environment={"SPOKEN_WORD": "here"})
    assert done.stdout.split() == ["here", str(tmp_path), "2"]
    assert done.stderr.split() == ["aside"]


def test_a_program_that_fails_is_quoted() -> None:
    with pytest.raises(SystemExit, match=r"ends with 1:[\s\S]*KeyError: 'SPOKEN_WORD'"):
        run_program(sys.executable, "-c", SAY)


def test_memory_is_watched(tmp_path: Path) -> None:
    found = watched([sys.executable, "-c", FILL, "0"], tmp_path / "log")
    assert found.anonymous > 64 << 20
    assert found.resident >= found.anonymous
    assert found.seconds > 0.3
    with pytest.raises(SystemExit, match="ends with 3"):
        watched([sys.executable, "-c", FILL, "3"], tmp_path / "log")
