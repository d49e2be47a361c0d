"""A model whose experts have gate and up in one tensor and odd widths, the whole way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf.llama_cpp.in_process import LlamaModel
from tests.calibration.conftest import picture


def test_convert_and_answer_about_a_picture(
    pico_gemma4: Path, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    samples = ("--image-samples", "1", "--text-samples", "1", "--no-validate")
    with caplog.at_level("INFO", "mode_gguf"):
        result = json.loads(run("convert", pico_gemma4, "--bpw", "3.3", "--out", tmp_path, "--json", *samples))
    assert "model.audio_tower.output_proj.weight and 0 more tensors are left out" in caplog.text
    assert 3.3 * 0.98 <= result["bpw"] <= 3.3
    types = {tensor["name"]: tensor["type"] for tensor in json.loads((tmp_path / "plan.json").read_text())["tensors"]}
    assert types["blk.0.ffn_down_exps.scale"] == types["rope_freqs.weight"] == "F32"
    assert {"F32", "BF16"}.isdisjoint(types[f"blk.0.{name}.weight"] for name in ("attn_k", "ffn_gate_up_exps"))
    assert {types[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(4)} <= {"IQ4_NL", "Q5_0", "Q5_1"}
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        assert model.generate(model.chat_template.question("What?", model.image_marker), picture(0), max_tokens=4)
