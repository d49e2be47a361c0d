"""Weights in FP8: every bit pattern, and scales of every form, against torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mode_gguf.checkpoint import fp8
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return (4 * torch.randn(*shape, generator=GENERATOR)).to(torch.float8_e4m3fn)


def written(folder: Path, tensors: dict[str, torch.Tensor], block: str = "null") -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    quantization = f'{{"quant_method": "fp8", "weight_block_size": {block}}}'
    (folder / "config.json").write_text(f'{{"quantization_config": {quantization}}}')
    return Checkpoint.open(folder)


def test_every_bit_pattern() -> None:
    raw = torch.arange(256, dtype=torch.uint8)
    expected = raw.view(torch.float8_e4m3fn).float().numpy()
    found = fp8.decoded(raw.numpy(), np.ones((), np.float32), (256,), (256,), ())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((6, 10), (), "null"),
        ((6, 10), (1,), "null"),
        ((6, 10), (6, 1), "null"),
        ((6, 10), (2, 3), "[4, 4]"),
        ((4, 6, 10), (4,), "null"),
        ((4, 6, 10), (4, 1, 1), "null"),
        ((4, 6, 10), (4, 2, 1), "null"),
        ((4, 6, 10), (4, 2, 3), "[4, 4]"),
    ],
)
def test_scales(tmp_path: Path, shape: tuple[int, ...], scales: tuple[int, ...], block: str) -> None:
    weights, factors = drawn(*shape), torch.rand(scales, generator=GENERATOR) + 0.5
    checkpoint = written(tmp_path, {"w": weights, "w_scale_inv": factors, "w_activation_scale": torch.ones(())}, block)
    assert list(checkpoint.tensors) == ["w"]
    assert "quantization_config" not in checkpoint.config
    expanded = factors.reshape(*scales, *[1] * (len(shape) - len(scales)))
    for axis in range(len(shape)):
        in_blocks = block != "null" and axis >= len(shape) - 2
        each = 4 if in_blocks else shape[axis] // expanded.shape[axis]
        expanded = expanded.repeat_interleave(each, axis).narrow(axis, 0, shape[axis])
    expected = (weights.float() * expanded).numpy()
    np.testing.assert_array_equal(checkpoint.read("w"), expected)
    for index in (2, slice(1, 3), np.array([3, 0]), (slice(None), slice(2, 5)), (1, slice(2, 9))):
        np.testing.assert_array_equal(checkpoint.read("w", index), expected[index])


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    weights, scale = drawn(2, 3), torch.tensor(0.3, dtype=torch.bfloat16)
    checkpoint = written(tmp_path, {"w": weights, "w_scale_inv": scale})
    np.testing.assert_array_equal(checkpoint.read("w"), (weights.float() * scale.float()).numpy())


@pytest.mark.parametrize("scales", [(5,), (3, 3), (6, 10, 1)])
def test_scales_of_another_tensor(tmp_path: Path, scales: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"w_scale_inv is F32 .* expected its scales"):
        written(tmp_path, {"w": drawn(6, 10), "w_scale_inv": torch.ones(scales)})


def test_no_scales(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"w_scale_inv is missing; .*BF16 original"):
        written(tmp_path, {"w": drawn(6, 10)})


def test_broken_block_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weight_block_size"):
        written(tmp_path, {"w": drawn(6, 10), "w_scale_inv": torch.ones(())}, "[0, 4]")
