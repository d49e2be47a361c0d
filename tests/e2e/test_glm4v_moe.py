"""A model with a dense first layer, rows that K-quants do not fit and a block that is left out, the whole way."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mode_gguf.validation.llama_cpp import LlamaModel
from tests.calibration.conftest import picture
from tests.families.pico.glm4v_moe import LAYERS

SAMPLES = ("--image-samples", "2", "--text-samples", "1")


def test_convert_and_answer_about_a_picture(
    pico_glm4v: Path, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    types = ("--types", "Q3_K,Q5_K", "--dense-types", "Q4_K,Q8_0", "--effort", "fast")
    options = ("--bpw", "4.5", "--out", tmp_path, "--json", "--no-validate", *types, *SAMPLES)
    with caplog.at_level("INFO", "mode_gguf"):
        result = json.loads(run("convert", pico_glm4v, *options))
    assert f"layers.{LAYERS}.eh_proj.weight and 2 more tensors are left out" in caplog.text
    assert 4.5 * 0.98 <= result["bpw"] <= 4.5
    plan = {tensor["name"]: tensor["type"] for tensor in json.loads((tmp_path / "plan.json").read_text())["tensors"]}
    kept = ("blk.0.attn_q.bias", "blk.1.exp_probs_b.bias", "blk.1.ffn_gate_inp.weight")
    assert {plan[name] for name in kept} == {"F32"}
    dense = ("blk.0.ffn_gate", "blk.0.ffn_down", "blk.1.ffn_down_shexp", "blk.1.ffn_down_exps", "blk.1.attn_output")
    assert {"F32", "F16", "BF16"}.isdisjoint(plan[f"{name}.weight"] for name in dense)
    image: Image.Image = picture(0)
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        assert model.generate(model.chat_template.question("What?", model.image_marker), image, max_tokens=4)


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(
    pico_glm4v: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    options = ("--types", "Q3_K,Q4_K", "--bpw", "2.0", "--out", tmp_path, *SAMPLES)
    error = run("convert", pico_glm4v, *options, code=3)
    assert "--bpw 2 cannot be reached" in error
    assert re.search(r"rows of 352 in 3 tensors .*do not fit Q3_K, Q4_K", error)
    assert re.search(r"rows of 480 in 1 tensors .*do not fit", error)
    assert not list(tmp_path.glob("calibration*"))


def test_fit_is_refused_by_name(pico_glm4v: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    options = ("--fit", "1GiB", "--ctx", "2048", "--out", tmp_path, *SAMPLES)
    assert "--fit is not known for glm4moe yet" in run("convert", pico_glm4v, *options, code=2)
