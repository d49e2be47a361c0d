"""Memory of a model with a type per expert in our patched llama.cpp, on the path that GPUs take."""

from pathlib import Path

import pytest

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.gpu_memory.breakdown import kv_bytes, text_batch
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.gpu_memory.model_graphs import TextShape
from mode_gguf.gpu_memory.qwen3_vl_moe import text_graph
from mode_gguf.llama_cpp import c_api
from mode_gguf.llama_cpp.runtime.random_model import RandomModelShape, random_groups, write_random_model
from mode_gguf.pipeline.gpu_budget import model_shape
from mode_gguf.quantization.types import QUANT_TYPES
from tests.gpu_memory.reported import MIB, context_sizes, loaded
from tests.llama_cpp.builds import PATCHED, STOCK, named_build

pytestmark = pytest.mark.runtime

DEMO = Path(__file__).parents[3] / "demo" / "Demo-VL-MoE"
TYPES = ("Q2_K", "Q3_K", "Q4_K")


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    "shape",
    [RandomModelShape(512, 256, 8, 3, 3, 8, 2, 64), RandomModelShape(768, 256, 12, 6, 4, 8, 2, 64, 5000)],
    ids=("small", "larger"),
)
def test_groups(shape: RandomModelShape, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_EXPERT_GROUPS", "mask")
    lib = c_api.runtime_library(named_build(PATCHED))
    members = random_groups(shape, [shape.experts - groups + 1, *[1] * (groups - 1)])
    path = write_random_model(tmp_path / "model.gguf", shape, TYPES[:groups], members)
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


def test_stock_build_takes_no_more(tmp_path: Path) -> None:
    """The release that we build on, on the demo checkpoint; the package `xllamacpp` carries a newer one."""
    checkpoint = Checkpoint.open(DEMO)
    types = {
        tensor.name: QUANT_TYPES["F32" if tensor.role is Role.KEEP else "BF16"] for tensor in text_tensors(checkpoint)
    }
    write_text_model(tmp_path / "demo.gguf", checkpoint, TensorPacking(types))
    fit = FitSettings(context=4096)
    text = model_shape(checkpoint, fit).text
    lib = c_api.runtime_library(named_build(STOCK))
    with loaded(tmp_path / "demo.gguf", lib=lib) as model:
        cache, compute, _ = context_sizes(model, fit, lib)
    assert abs(kv_bytes(text, fit) / MIB - cache) < 0.006
    computed = text_graph(text, text_batch(text, fit, gpu=False)).buffer_bytes() / MIB
    assert compute - 0.006 <= computed <= 1.03 * compute
