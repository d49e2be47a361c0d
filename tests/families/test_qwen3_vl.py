"""What only Qwen3-VL has: experts that are stored in two orientations, and DeepStack."""

import json
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from tests.families.changed import changed
from tests.families.pico.files import write_json
from tests.families.pico.qwen3_vl_moe import Layout, write_pico_qwen3vlmoe


class TestSquareExperts:
    """I = 256 = H makes down_proj square, 2I = 256 = H makes gate_up_proj square."""

    @pytest.mark.parametrize("width", [128, 256])
    @pytest.mark.parametrize("layout", ["public", "module"])
    def test_the_version_decides(self, tmp_path: Path, width: int, layout: Layout) -> None:
        other: Layout = "public" if layout == "module" else "module"
        folders = [write_pico_qwen3vlmoe(tmp_path / name, layout=name, expert_width=width) for name in (layout, other)]
        found, wanted = (text_tensors(Checkpoint.open(folder)) for folder in folders)
        for tensor, expected in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(tensor.read(0), expected.read(0), err_msg=tensor.name)

    def test_without_a_version_they_are_refused(self, tmp_path: Path) -> None:
        folder = write_pico_qwen3vlmoe(tmp_path / "square", expert_width=256)
        checkpoint = changed(folder, tmp_path / "unknown", transformers_version=None)
        with pytest.raises(InputError, match=r"transformers_version is missing.*down_proj"):
            text_tensors(checkpoint)


def test_as_many_deepstack_mergers_as_layers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 DeepStack mergers for 2 decoder layers"):
        find_family(Checkpoint.open(write_pico_qwen3vlmoe(tmp_path, layers=2)))


def test_tensor_without_a_place(tmp_path: Path) -> None:
    """A layer more than config.json says."""
    deeper = write_pico_qwen3vlmoe(tmp_path / "deeper", layers=4)
    with pytest.raises(InputError, match=r"layers\.3\.\S+ \[.*\] has no place"):
        text_tensors(changed(deeper, tmp_path / "shallow", "text_config", num_hidden_layers=3))


def test_projector_metadata_from_processor_config(pico: Path, tmp_path: Path) -> None:
    """transformers 5 saves the image processor's settings inside processor_config.json."""
    stored, moved = Checkpoint.open(pico), changed(pico, tmp_path / "checkpoint")
    separate = moved.path / "preprocessor_config.json"
    write_json(moved.path / "processor_config.json", {"image_processor": json.loads(separate.read_text())})
    separate.unlink()
    assert find_family(moved).projector_metadata(moved) == find_family(stored).projector_metadata(stored)
