"""Qwen3.5 the whole way, with the block that is left out in a file of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf.gguf.header import read_header
from tests.families.case.qwen3_5 import QWEN3_5
from tests.families.test_convert import convert_and_answer


def test_convert_and_answer_about_a_picture(
    pico_qwen3_5: Path, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    convert_and_answer(QWEN3_5, pico_qwen3_5, tmp_path, run, caplog)
    drafting = json.loads(run("export", pico_qwen3_5, "--out", tmp_path, "--mtp", "Q8_0", "--json"))
    assert Path(drafting["mtp"]).name == f"mtp-{pico_qwen3_5.name}-Q8_0.gguf"
    assert read_header(Path(drafting["mtp"])).tensors
