"""Mistral Small 4 the whole way, stored in FP8; what becomes of the parts of latent attention that nobody measures."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.pipeline.report_data import planned_tensors
from tests.families.case.mistral4 import MISTRAL4
from tests.families.whole_way import convert_and_answer


def test_convert_and_answer_about_a_picture(
    tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, out = MISTRAL4.write(tmp_path / "Pico-Mistral", fp8=True), tmp_path / "out"
    types = convert_and_answer(MISTRAL4, checkpoint, out, run, caplog)
    absorbed = {f"blk.{layer}.{part}.weight" for layer in range(3) for part in ("attn_k_b", "attn_v_b")}
    assert {types[name] for name in absorbed} == {"Q8_0"}
    measured = {name.split(".")[2] for name in read_imatrix(next(out.glob("imatrix-fisher-*.gguf"))) if "attn" in name}
    assert measured == {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output"}
    roles = {tensor.name: tensor.role for tensor in text_tensors(Checkpoint.open(checkpoint))}
    plan, table = Plan.load(out / "plan.json"), SensitivityTable.load(out / "sensitivity.safetensors")
    assert {tensor.name: tensor.role for tensor in planned_tensors(plan, table)} == roles
