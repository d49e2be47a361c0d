"""Kimi-VL, whose code is not in transformers, the whole way."""

import json
from collections.abc import Callable
from pathlib import Path

from mode_gguf.llama_cpp.in_process import LlamaModel
from tests.calibration.conftest import picture


def test_convert_and_answer_about_a_picture(pico_kimi_vl: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    samples = ("--image-samples", "1", "--text-samples", "1", "--no-validate", "--rounding", "nearest")
    result = json.loads(run("convert", pico_kimi_vl, "--bpw", "3.5", "--out", tmp_path, "--json", *samples))
    assert 3.5 * 0.99 <= result["bpw"] <= 3.5
    types = {tensor["name"]: tensor["type"] for tensor in json.loads((tmp_path / "plan.json").read_text())["tensors"]}
    assert types["blk.1.exp_probs_b.bias"] == "F32"
    assert types["blk.1.ffn_down_exps.weight"] in {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}  # rows of 160
    assert {"F32", "BF16"}.isdisjoint(types[f"blk.{name}.weight"] for name in ("0.ffn_up", "1.ffn_up_shexp"))
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        prompt = model.chat_template.question("What?", model.image_marker)
        assert model.generate(prompt, picture(0, 112, 112), max_tokens=4)
