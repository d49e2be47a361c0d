"""What a model with a type per expert takes in our patched llama.cpp, on the path that GPUs take."""

import os
from pathlib import Path

import pytest

from mode_gguf.memory.ledger import text_batch
from mode_gguf.memory.qwen3_vl_moe import TextShape, text_graph
from mode_gguf.memory.settings import FitSettings
from mode_gguf.runtime.drawn_model import Shape, drawn_groups, write_drawn_model
from mode_gguf.validation import c_api
from tests.memory.reported import MIB, context_sizes, loaded

pytestmark = pytest.mark.runtime

TYPES = ("Q2_K", "Q3_K", "Q4_K")


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    "shape", [Shape(512, 256, 8, 3, 3, 8, 2, 64), Shape(768, 256, 12, 6, 4, 8, 2, 64, 5000)], ids=("small", "larger")
)
def test_groups(shape: Shape, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_EXPERT_GROUPS", "mask")
    lib = c_api.runtime_library(Path(os.environ["MODE_GGUF_PATCHED_BUILD"]))
    members = drawn_groups(shape, [shape.experts - groups + 1, *[1] * (groups - 1)])
    path = write_drawn_model(tmp_path / "model.gguf", shape, TYPES[:groups], members)
    text = TextShape(
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        experts=shape.experts,
        experts_used=shape.used,
        expert_width=shape.width,
        vocabulary=shape.vocabulary,
        deepstack=0,
    )
    fit = FitSettings(context=2048)
    with loaded(path, lib=lib) as model:
        _, compute, _ = context_sizes(model, fit, lib)
    computed = text_graph(text, text_batch(text, fit, groups, gpu=False)).buffer_bytes() / MIB
    assert compute - 0.006 <= computed <= 1.03 * compute
