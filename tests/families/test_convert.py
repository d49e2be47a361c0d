"""Every family the whole way; those that take long, or for which there is more to check, have modules of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.llama_cpp.in_process import LlamaModel
from tests.families.cases import CASES
from tests.families.conftest import Families
from tests.families.family_case import Conversion, FamilyCase
from tests.families.prompts import waves

TOGETHER = [case for case in CASES if case.conversion and not case.conversion.alone]
UNQUANTIZED = {"F32", "F16", "BF16"}


def convert_and_answer(
    case: FamilyCase, checkpoint: Path, out: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> dict[str, str]:
    """Checks all that the case's `Conversion` says; returns the plan's types by tensor."""
    asked = case.conversion
    assert isinstance(asked, Conversion)
    with caplog.at_level("INFO", "mode_gguf"):
        result = json.loads(run("convert", checkpoint, "--bpw", str(asked.bpw), "--out", out, "--json", *asked.options))
    assert asked.log in caplog.text
    assert asked.bpw * asked.reached <= result["bpw"] <= asked.bpw
    plan: list[dict[str, Any]] = json.loads((out / "plan.json").read_text())["tensors"]
    types = {tensor["name"]: str(tensor["type"]) for tensor in plan}
    assert {types[name] for name in asked.f32.split()} <= {"F32"}
    assert UNQUANTIZED.isdisjoint(types[f"{name}.weight"] for name in asked.quantized.split())
    if asked.among:
        name, among = asked.among
        assert {types[f"blk.{layer}.{name}.weight"] for layer in case.moe_layers} <= set(among.split())
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        question = model.chat_template.question("What?", model.image_marker)
        assert model.generate(question, waves(case.pictures[0]), max_tokens=4)
    return types


@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.name)
def test_convert_and_answer_about_a_picture(
    case: FamilyCase, families: Families, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    convert_and_answer(case, families.checkpoint(case.layouts[0]).path, tmp_path, run, caplog)
