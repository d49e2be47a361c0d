"""A model in its authors' layout, whose code is never run, the whole way."""

import json
from collections.abc import Callable
from pathlib import Path

from mode_gguf.llama_cpp.in_process import LlamaModel
from tests.calibration.conftest import picture


def test_convert_and_answer_about_a_picture(pico_internvl: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    samples = ("--image-samples", "2", "--text-samples", "2", "--no-validate")
    result = json.loads(run("convert", pico_internvl, "--bpw", "3.0", "--out", tmp_path, "--json", *samples))
    assert 3.0 * 0.995 <= result["bpw"] <= 3.0
    with LlamaModel(Path(result["model"]), Path(result["mmproj"]), context=1024, threads=1) as model:
        assert model.generate(model.chat_template.question("What?", model.image_marker), picture(0), max_tokens=4)
