"""A model with linear attention, shared experts and a block that is left out, the whole way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mode_gguf.llama_cpp.in_process import LlamaModel
from tests.calibration.conftest import picture


def test_convert_and_answer_about_a_picture(
    pico_qwen3_5: Path, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    samples = ("--image-samples", "2", "--text-samples", "2", "--no-validate")
    with caplog.at_level("INFO", "mode_gguf"):
        result = json.loads(run("convert", pico_qwen3_5, "--bpw", "3.0", "--out", tmp_path, "--json", *samples))
    assert "more tensors are left out; `mode-gguf mtp` writes them to a file to draft with" in caplog.text
    drafting = json.loads(run("mtp", pico_qwen3_5, "--out", tmp_path, "--json"))
    assert Path(drafting["mtp"]).name == f"mtp-{pico_qwen3_5.name}-Q8_0.gguf"
    assert Path(drafting["mtp"]).stat().st_size == drafting["size_bytes"]
    assert 3.0 * 0.995 <= result["bpw"] <= 3.0
    types = {tensor["name"]: tensor["type"] for tensor in json.loads((tmp_path / "plan.json").read_text())["tensors"]}
    assert types["blk.0.ssm_a"] == types["blk.0.ffn_gate_inp_shexp.weight"] == "F32"
    assert {"F32", "BF16"}.isdisjoint(types[f"blk.0.{name}.weight"] for name in ("attn_qkv", "ssm_out", "ffn_up_shexp"))
    image: Image.Image = picture(0)
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        assert model.generate(model.chat_template.question("What?", model.image_marker), image, max_tokens=4)
