"""Calibration of a model with latent attention, whose pictures have row breaks, against the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.converted import as_tensor
from mode_gguf.calibration.inputs import InputBuilder
from mode_gguf.calibration.sample import Message, Sample
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from tests.calibration.conftest import picture
from tests.calibration.test_streaming import assert_streamed_is_plain, build, streamed_logits
from tests.families.pico.mistral4 import EXPERTS, LAYERS, MERGE, PATCH, TOP_K, token_id, write_pico_mistral4

CPU = torch.device("cpu")
SIDE = PATCH * MERGE


@pytest.fixture(scope="module")
def plain(pico_mistral4: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pico_mistral4, dtype=torch.float32).eval()


@pytest.mark.parametrize("layout", ["pico_mistral4", "pico_mistral4_module"])
def test_streamed_forward_equals_the_plain_one(
    layout: str, plain: Any, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    inputs = build(folder, samples[1:4])
    assert_streamed_is_plain(open_streamed(Checkpoint.open(folder), "cpu"), inputs, plain, atol=1e-4)


def test_fp8_streams_as_the_weights_it_stands_for(tmp_path: Path, samples: list[Sample]) -> None:
    folder = write_pico_mistral4(tmp_path / "fp8", fp8=True)
    checkpoint = Checkpoint.open(folder)
    decoded = write_pico_mistral4(tmp_path / "decoded")
    (decoded / "model.safetensors.index.json").unlink()
    weights = {name: as_tensor(checkpoint.read(name)) for name in checkpoint.tensors}
    save_file(weights, decoded / "model.safetensors", {"format": "pt"})
    plain = AutoModelForImageTextToText.from_pretrained(decoded, dtype=torch.float32).eval()
    (one,) = inputs = build(folder, samples[2:3])
    (logits,) = streamed_logits(open_streamed(checkpoint, "cpu"), inputs).values()
    with torch.no_grad():
        expected = plain(**one.model_arguments(CPU, torch.float32)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "height", "pixels", "rows", "columns"),
    [
        (112, 84, 512 * 512, 3, 4),
        (96, 160, 512 * 512, 6, 4),  # sides are rounded up to whole pieces
        (640, 320, 100 * 100, 2, 5),  # and the area is kept to, in the picture's proportions
        (10, 10, 512 * 512, 1, 1),
    ],
)
def test_pieces_breaks_and_the_end(
    pico_mistral4: Path, width: int, height: int, pixels: int, rows: int, columns: int
) -> None:
    builder = InputBuilder.open(Checkpoint.open(pico_mistral4), max_image_pixels=pixels)
    shown = picture(0, max(width, 16), max(height, 16)).resize((width, height))
    chat = (Message("user", "What is it?"), Message("assistant", "Red."))
    inputs = builder.build(Sample("i", "tests", messages=chat, image=shown))
    piece, row_break, end, begin = (token_id(token) for token in ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]"))
    tokens = [*[piece] * columns, row_break] * rows
    expected = [begin, *tokens[:-1], end]
    assert inputs.input_ids[1 : 1 + len(expected)].tolist() == expected
    assert torch.equal(inputs.is_vision, inputs.input_ids == piece)
    assert int(inputs.is_vision.sum()) == rows * columns
    assert inputs.image["image_sizes"].tolist() == [[rows * SIDE, columns * SIDE]]
    assert inputs.image["pixel_values"].shape == (1, 3, rows * SIDE, columns * SIDE)
    assert builder.tokenizer.decode(inputs.input_ids[inputs.is_query]) == "What is it?Red."
    arguments = inputs.model_arguments(CPU, torch.float32)
    assert set(arguments) == {"input_ids", "use_cache", "pixel_values", "image_sizes"}


def test_sums_are_those_of_the_whole_model(pico_mistral4: Path, plain: Any, samples: list[Sample]) -> None:
    """Of every matrix, from plain module hooks."""
    checkpoint = Checkpoint.open(pico_mistral4)
    statistics = calibrate(checkpoint, samples, device="cpu")
    tensors = text_tensors(checkpoint)
    inputs = build(pico_mistral4, samples)
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.setdefault(name, []).append(arguments[0].flatten(0, -2))

    modules = {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }
    hooks = [plain.lm_head.register_forward_hook(record("output.weight"))]
    for layer, block in enumerate(plain.model.language_model.layers):
        for name, module in modules.items():
            hooks.append(block.get_submodule(module).register_forward_hook(record(f"blk.{layer}.{name}.weight")))
        hooks.append(block.mlp.experts.register_forward_hook(record(f"x{layer}")))
        hooks.append(
            block.mlp.gate.register_forward_hook(lambda m, a, o, n=f"i{layer}": seen.setdefault(n, []).append(o[2]))
        )
    with torch.no_grad():
        for one in inputs:
            plain(**one.model_arguments(CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    dense = {str(tensor.activation) for tensor in tensors if tensor.role in (Role.DENSE, Role.OUTPUT)}
    assert dense == {name for name in seen if name[0] not in "xi"}
    for name in dense:
        expected = torch.cat(seen[name]).double().square().sum(0).numpy()
        np.testing.assert_allclose(
            statistics.arrays[f"{name}.sum2"].sum(axis=(0, 1)), expected, rtol=1e-3, err_msg=name
        )
    vision = sum(int(one.is_vision.sum()) for one in inputs)
    for layer in range(LAYERS):
        tokens = statistics.arrays[f"blk.{layer}.attn_q_a.weight.count"][:, 0]
        assert tokens[1:].sum() == vision == statistics.samples.vision_tokens
        np.testing.assert_array_equal(statistics.counts(layer).sum(axis=1), tokens * TOP_K)
        x, index = torch.cat(seen[f"x{layer}"]), torch.cat(seen[f"i{layer}"])
        experts = plain.model.language_model.layers[layer].mlp.experts
        for expert in range(EXPERTS):
            read = x[(index == expert).any(-1)]
            gate, up = torch.nn.functional.linear(read, experts.gate_up_proj[expert]).chunk(2, -1)
            assert statistics.counts(layer)[:, expert].sum() == len(read)
            for suffix, values in (("input", read), ("hidden", torch.nn.functional.silu(gate) * up)):
                sum2 = statistics.arrays[f"blk.{layer}.ffn_exps.{suffix}.sum2"][:, expert].sum(axis=0)
                expected = values.double().square().sum(0).detach().numpy()
                np.testing.assert_allclose(sum2, expected, rtol=1e-3, atol=1e-6)
    assert not [name for name in statistics.arrays if "attn_k_b" in name or "attn_v_b" in name or "kv_b" in name]
