import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mode_gguf.architectures.tensors import as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from tests.families.pico.kimi import HIDDEN, WIDTH, packed

NAME = "language_model.model.layers.1.mlp.experts.2.down_proj.weight"


def test_what_the_numbers_stand_for(pico_kimi_k25_packed: Path, pico_kimi_k25: Path) -> None:
    checkpoint = Checkpoint.open(pico_kimi_k25_packed)
    assert checkpoint.shape(NAME) == (HIDDEN, WIDTH)
    assert not [name for name in checkpoint.tensors if name.endswith(("_packed", "_scale", "_shape"))]
    found = checkpoint.read(NAME)
    full = as_float32(Checkpoint.open(pico_kimi_k25).read(NAME))
    groups = np.abs(full).reshape(HIDDEN, -1, 32).max(-1, keepdims=True) / 7.5
    assert (np.abs(found - full).reshape(HIDDEN, -1, 32) <= 0.6 * groups).all()
    np.testing.assert_array_equal(checkpoint.read(NAME, slice(3, 9)), found[3:9])


def test_every_number() -> None:
    from mode_gguf.checkpoint.compressed_tensors import unpacked

    weight = torch.arange(-8, 8).repeat(2, 2) * torch.tensor([[0.5], [2.0]])
    parts = packed("w", weight)
    scale = parts["w_scale"].float().numpy()
    found = unpacked(parts["w_packed"].numpy(), scale) / scale
    assert found[0].tolist() == [max(-8, min(7, round(n / scale[0, 0] / 2))) for n in range(-8, 8)] * 2


@pytest.mark.parametrize(
    "change", [{"num_bits": 8}, {"symmetric": False}, {"strategy": "channel"}, {"actorder": "group"}]
)
def test_other_packing_is_refused(pico_kimi_k25_packed: Path, tmp_path: Path, change: dict[str, object]) -> None:
    folder = shutil.copytree(pico_kimi_k25_packed, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"already quantized \(compressed-tensors pack-quantized; .*\).*symmetric 4-bit groups"
    ):
        Checkpoint.open(folder)
