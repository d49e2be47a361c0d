"""Gemma 4 the whole way, with default types."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.case.gemma4 import GEMMA4
from tests.families.whole_way import convert_and_answer


def test_convert_and_answer_about_a_picture(
    pico_gemma4: Path, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    convert_and_answer(GEMMA4, pico_gemma4, tmp_path, run, caplog)
