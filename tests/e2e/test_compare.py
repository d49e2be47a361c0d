"""Two files beside each other: `inspect A B`."""

import json
from pathlib import Path

import numpy as np

from mode_gguf.quantization.file_comparison import compare
from tests.e2e.conftest import Run
from tests.quantization.test_file_comparison import EXPERT_NAMES, weights, write


def test_compare(tmp_path: Path, run: Run) -> None:
    full, packed = write(tmp_path / "full.gguf", weights()), write(tmp_path / "packed.gguf", weights(), "Q8_0")
    found = json.loads(run("inspect", full, packed, "--json"))
    assert found == compare(full, packed).model_dump(mode="json")
    printed = run("inspect", full, packed)
    for text in (*EXPERT_NAMES, "Q8_0", "packed.gguf", f"{found['total']['error']:.3g} over all"):
        assert text in printed
    strange = write(tmp_path / "strange.gguf", {"a.weight": np.ones((2, 32), np.float32)})
    assert "no tensor of the same name" in run("inspect", full, strange, code=4)
    assert "cannot be read" in run("inspect", full, tmp_path / "nothing.gguf", code=4)
    (tmp_path / "text.gguf").write_text("not a model")
    assert "not a GGUF file" in run("inspect", tmp_path / "text.gguf", full, code=4)
