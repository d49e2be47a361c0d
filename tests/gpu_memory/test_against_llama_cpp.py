"""Memory as computed beside what real llama.cpp says: never below, and by 3 % above at most."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.gpu_memory.breakdown import ModelShape, image_side, kv_bytes, text_batch
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.gpu_memory.model_graphs import EncoderShape, TextShape
from mode_gguf.gpu_memory.qwen3_vl_moe import encoder_graph, text_graph
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.pipeline.gpu_budget import model_shape
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.vocabulary import KvType
from tests.gpu_memory.hollow import write_hollow_projector, write_hollow_text_model
from tests.gpu_memory.reported import MIB, context_sizes, encoder_sizes, lines_of_llama_cpp, loaded, sizes

DEMO = Path(__file__).parents[2] / "demo" / "Demo-VL-MoE"
ROUNDING = 0.006
"""MiB; llama.cpp prints two places."""
WARM_UP_TOKENS = 46 * 46
PUBLISHED = {
    "30B-A3B": TextShape(2048, 48, 32, 4, 128, 128, 8, 768, 151_936, 3),
    "235B-A22B": TextShape(4096, 94, 64, 4, 128, 128, 8, 1536, 151_936, 3),
}
KV_TYPES: tuple[KvType, ...] = ("f16", "q8_0")
RUNS = [
    FitSettings(context=context, parallel=parallel, kv_type=kv_type)
    for context, parallel, kv_type in product((512, 4096, 32768), (1, 4), KV_TYPES)
]
ODD_RUNS = [
    FitSettings(context=8192, parallel=4, batch=256),
    FitSettings(context=40_000, parallel=3, kv_type="q4_0", batch=500),
    FitSettings(context=100, batch=64),
    FitSettings(context=6000, batch=2048),
]


def assert_close(computed: int, reported: float) -> None:
    assert reported - ROUNDING <= computed / MIB <= 1.03 * reported + ROUNDING


def check_contexts(model: int, shape: TextShape, runs: list[FitSettings]) -> None:
    for fit in runs:
        cache, compute, output = context_sizes(model, fit)
        assert kv_bytes(shape, fit) / MIB == pytest.approx(cache, abs=ROUNDING), fit
        assert_close(text_graph(shape, text_batch(shape, fit, gpu=False)).buffer_bytes(), compute)
        assert_close(4 * shape.vocabulary * fit.parallel, output)


def encoder_bytes(shape: EncoderShape, tokens: int) -> int:
    side = image_side(shape, tokens)
    return encoder_graph(shape, side, side).buffer_bytes()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelShape, int, Path, Path]:
    """Its shape, bytes of its tensors, and its two files."""
    checkpoint, folder = Checkpoint.open(DEMO), tmp_path_factory.mktemp("demo")
    tensors = text_tensors(checkpoint)
    types = {t.name: QUANT_TYPES["F32" if t.role is Role.KEEP else "BF16"] for t in tensors}
    text, mmproj = folder / "demo.gguf", folder / "mmproj-demo.gguf"
    write_text_model(text, checkpoint, TensorPacking(types))
    write_projector(mmproj, checkpoint)
    size = sum(t.n_weights * types[t.name].type_size for t in tensors)
    return model_shape(checkpoint, FitSettings(context=4096)), size, text, mmproj


def test_demo_text_model(demo: tuple[ModelShape, int, Path, Path]) -> None:
    shape, size, text, _ = demo
    with lines_of_llama_cpp() as lines, loaded(text) as model:
        (weights,) = sizes(lines, "model buffer size")
        assert size / MIB == pytest.approx(weights, rel=0.001)
        check_contexts(model, shape.text, RUNS + ODD_RUNS)


def test_demo_image_encoder(demo: tuple[ModelShape, int, Path, Path]) -> None:
    shape, _, _, mmproj = demo
    weights, compute = encoder_sizes(mmproj)
    assert shape.projector_bytes / MIB == pytest.approx(weights, abs=ROUNDING)
    assert_close(encoder_bytes(shape.encoder, WARM_UP_TOKENS), compute)


@pytest.mark.parametrize("size", [(1024, 64), (176, 176), (144, 400)], ids=str)
def test_demo_pictures(demo: tuple[ModelShape, int, Path, Path], size: tuple[int, int]) -> None:
    """Any form, and that for which no positions are interpolated."""
    shape, _, text, mmproj = demo
    with lines_of_llama_cpp() as lines, LlamaModel(text, mmproj, context=1024, threads=1) as model:
        lines.clear()
        model.generate(f"{model.image_marker} green sign?", Image.new("RGB", size), max_tokens=1)
    (compute,) = sizes(lines, "reserve_compute_meta:")
    columns, rows = (length // shape.encoder.patch for length in size)
    assert_close(encoder_graph(shape.encoder, columns, rows).buffer_bytes(), compute)


@pytest.fixture
def hollow(tmp_path: Path) -> Iterator[Path]:
    """Removed at once: what is sparse here may be copied elsewhere."""
    path = tmp_path / "hollow.gguf"
    yield path
    path.unlink()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_models(name: str, hollow: Path) -> None:
    with loaded(write_hollow_text_model(hollow, PUBLISHED[name]), weights=False) as model:
        check_contexts(model, PUBLISHED[name], RUNS)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_text_models(seed: int, hollow: Path) -> None:
    shape = drawn_text_shape(np.random.default_rng(seed))
    with loaded(write_hollow_text_model(hollow, shape), weights=False) as model:
        check_contexts(model, shape, [*RUNS[-4:], *ODD_RUNS])


@pytest.mark.parametrize("seed", range(4))
def test_drawn_image_encoders(seed: int, hollow: Path) -> None:
    shape = drawn_encoder_shape(np.random.default_rng(seed))
    _, compute = encoder_sizes(write_hollow_projector(hollow, shape))
    assert_close(encoder_bytes(shape, WARM_UP_TOKENS), compute)


def drawn_text_shape(rng: np.random.Generator) -> TextShape:
    layers, experts, kv_heads = (int(rng.integers(*bounds)) for bounds in ((2, 9), (2, 65), (1, 9)))
    return TextShape(
        hidden=32 * int(rng.integers(1, 129)),
        layers=layers,
        heads=kv_heads * int(rng.choice([1, 2, 4, 8])),
        kv_heads=kv_heads,
        head_dim=int(rng.choice([32, 64, 96, 128, 256])),
        experts=experts,
        experts_used=int(rng.integers(1, min(experts, 10) + 1)),
        expert_width=32 * int(rng.integers(1, 65)),
        vocabulary=int(rng.integers(100, 200_000)),
        deepstack=int(rng.integers(0, min(4, layers))),
    )


def drawn_encoder_shape(rng: np.random.Generator) -> EncoderShape:
    blocks, heads = int(rng.integers(2, 7)), int(rng.choice([2, 4]))
    taps = rng.choice(blocks, int(rng.integers(1, min(3, blocks) + 1)), replace=False)
    return EncoderShape(
        hidden=heads * int(rng.choice([32, 64, 72])),
        width=32 * int(rng.integers(1, 30)),
        blocks=blocks,
        heads=heads,
        patch=int(rng.choice([8, 14, 16])),
        merge=2,
        output=64 * int(rng.integers(1, 20)),
        positions=int(rng.integers(8, 49)) ** 2,
        taps=tuple(sorted(map(int, taps))),
    )
