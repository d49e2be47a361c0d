"""Lines of the memory breakdown, and their dependence on the settings."""

from dataclasses import replace

import pytest

from mode_gguf.errors import UsageError
from mode_gguf.gpu_memory.breakdown import ModelShape, memory_lines, text_batch
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.gpu_memory.model_graphs import EncoderShape, TextShape
from mode_gguf.gpu_memory.qwen3_vl_moe import GRAPHS, text_graph

MODEL = ModelShape(
    graphs=GRAPHS,
    text=TextShape(2048, 48, 32, 4, 128, 128, 8, 768, 151_936, 3),
    encoder=EncoderShape(1152, 4304, 27, 16, 16, 2, 2048, 2304, (8, 16, 24)),
    text_tensors=579,
    projector_bytes=1 << 30,
    trained_context=262_144,
)
FIT = FitSettings(context=32768)


def lines(fit: FitSettings, model: ModelShape = MODEL, groups: int = 1) -> dict[str, int]:
    return {line.name: line.bytes for line in memory_lines(model, fit, groups)}


def changed(**settings: object) -> dict[str, int]:
    """Bytes that lines grow by."""
    before, after = lines(FIT), lines(FIT.model_copy(update=settings))
    return {name: after[name] - before[name] for name in before if after[name] != before[name]}


def test_kv_cache_by_hand() -> None:
    assert lines(FIT)["KV cache"] == 2 * 48 * 32768 * 4 * 128 * 2
    assert lines(FIT.model_copy(update={"kv_type": "q8_0"}))["KV cache"] == 2 * 48 * 32768 * 4 * 128 * 34 // 32


def test_contexts_are_rounded_as_llama_cpp_does() -> None:
    assert FitSettings(context=1).cells == 256
    assert FitSettings(context=1000, parallel=3).cells_per_stream == 512
    assert FitSettings(context=1000, parallel=3).cells == 1536


def test_what_each_setting_changes() -> None:
    mask = 512 * 32768 * 2
    assert changed(context=65536) == {"KV cache": lines(FIT)["KV cache"], "text compute buffer": mask}
    assert changed(reserve=FIT.reserve + 5) == {"reserve": 5}
    assert set(changed(image_tokens=1024)) == {"image compute buffer", "kernels' workspace"}
    assert set(changed(kv_type="q8_0")) == {"KV cache", "text compute buffer"}
    assert set(changed(parallel=2)) == {"text compute buffer", "output buffer"}


def test_a_gpu_unpacks_a_quantized_cache_of_one_layer() -> None:
    fit = FIT.model_copy(update={"kv_type": "q8_0"})
    gpu, cpu = (text_graph(MODEL.text, text_batch(MODEL.text, fit, gpu=gpu)).buffer_bytes() for gpu in (True, False))
    assert 0 <= gpu - cpu <= 2 * 2 * 32768 * 4 * 128


def test_groups_of_experts_take_more() -> None:
    sizes = [lines(FIT, groups=groups)["text compute buffer"] for groups in (1, 2, 5)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1]


def test_a_picture_is_no_larger_than_the_context() -> None:
    small = FitSettings(context=512)
    assert lines(small) == lines(small.model_copy(update={"image_tokens": 512}))


def test_a_context_beyond_the_trained_one_is_said() -> None:
    cache, *_ = memory_lines(replace(MODEL, trained_context=4096), FIT)
    assert "trained for 4096 tokens" in cache.what
    assert "trained" not in memory_lines(MODEL, FIT)[0].what


def test_only_the_output_buffer_is_not_on_the_gpu() -> None:
    assert [line.name for line in memory_lines(MODEL, FIT) if not line.on_gpu] == ["output buffer"]


def test_heads_that_no_block_fits() -> None:
    with pytest.raises(UsageError, match=r"--kv-type q8_0 stores 32 values .* heads have 80"):
        lines(FIT.model_copy(update={"kv_type": "q8_0"}), replace(MODEL, text=replace(MODEL.text, head_dim=80)))


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="--fit is not known for llama4"):
        ModelShape.of(None, "llama4", {}, {}, vocabulary=1, text_tensors=1, projector_bytes=1)
