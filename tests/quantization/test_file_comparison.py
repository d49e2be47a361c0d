"""Comparing two files: errors are those of the weights as gguf-py unpacks them, however the files are cut."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mode_gguf.errors import InputError
from mode_gguf.quantization import file_comparison
from mode_gguf.quantization.file_comparison import compare
from mode_gguf.quantization.packer import pack_matrix
from mode_gguf.quantization.types import QUANT_TYPES
from tests.llama_cpp.runtime.grouped_files import random_groups, write_grouped

Weights = Mapping[str, np.ndarray]
EXPERTS, ROWS, WIDTH = 6, 8, 512
EXPERT_NAMES = tuple(f"blk.0.ffn_{projection}_exps.weight" for projection in ("gate", "up", "down"))


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "token_embd.weight": random.standard_normal((20, WIDTH), np.float32),
        "blk.0.attn_norm.weight": random.standard_normal(WIDTH, np.float32),
        **{name: random.standard_normal((EXPERTS, ROWS, WIDTH), np.float32) for name in EXPERT_NAMES},
    }


def write(path: Path, tensors: Weights, types: Mapping[str, str] | str = "F32", **options: Any) -> Path:
    """A GGUF file made by gguf-py alone; norms stay F32, and so does what `types` does not name."""
    writer = gguf.GGUFWriter(path, "qwen3vlmoe", **options)
    writer.add_uint32("qwen3vlmoe.expert_count", EXPERTS)
    for name, values in tensors.items():
        wanted = types if isinstance(types, str) else types.get(name, "F32")
        quant_type = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else wanted]
        writer.add_tensor(name, packed(values, quant_type), raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(values: np.ndarray, quant_type: gguf.GGMLQuantizationType) -> np.ndarray:
    """Weights packed by gguf-py, or by us where it cannot."""
    try:
        return np.asarray(gguf.quantize(values, quant_type))
    except NotImplementedError:
        rows = pack_matrix(values.reshape(-1, WIDTH), QUANT_TYPES[quant_type.name], None, name="m")
        return rows.reshape(*values.shape[:-1], -1)


def unpacked(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in gguf.GGUFReader(path).tensors
    }


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(((second - first) ** 2).sum() / (first**2).sum())


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return write(tmp_path / "full.gguf", weights())


@pytest.mark.parametrize("quant_type", ["BF16", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "TQ2_0", "Q3_K", "IQ4_XS"])
def test_errors_are_those_of_gguf_py(full: Path, tmp_path: Path, quant_type: str) -> None:
    other = write(tmp_path / "other.gguf", weights(), quant_type)
    found = compare(full, other)
    before, after = unpacked(full), unpacked(other)
    assert [one.name for one in found.tensors] == list(before)
    for one in found.tensors:
        assert one.note is None
        assert one.error == pytest.approx(relative(before[one.name], after[one.name]), rel=1e-5, abs=1e-12)
        assert one.types == ({"F32": 1}, {"F32" if "norm" in one.name else quant_type: 1})
    everything = [np.concatenate([values.ravel() for values in side.values()]) for side in (before, after)]
    assert found.total.error == pytest.approx(relative(*everything), rel=1e-5)
    assert found.total.n_weights == len(everything[0])
    assert {total.types: total.tensors for total in found.by_types} == {("F32", quant_type): 4, ("F32", "F32"): 1}
    assert found.only == ([], [])


def test_chunks_and_shards_change_nothing(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(full, write(tmp_path / "whole.gguf", weights(), "Q8_0"))
    write(tmp_path / "cut.gguf", weights(), "Q8_0", split_max_tensors=2)
    shards = sorted(tmp_path.glob("cut-*.gguf"))
    assert len(shards) == 3
    monkeypatch.setattr(file_comparison, "_CHUNK_WEIGHTS", 3 * WIDTH)
    cut = compare(full, shards[0], threads=3)
    assert [one.error for one in cut.tensors] == pytest.approx([one.error for one in whole.tensors], rel=1e-6)
    assert cut.files[1].size_bytes == sum(shard.stat().st_size for shard in shards)
    with pytest.raises(InputError, match="give the first one"):
        compare(full, shards[1])


def test_experts_in_groups_are_put_together(full: Path, tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{quant_type}.gguf", weights(), quant_type) for quant_type in ("Q4_0", "Q8_0")]
    groups = random_groups([0], EXPERTS, 2, seed=1)
    grouped = write_grouped(tmp_path / "grouped.gguf", sources, groups)
    before, after = unpacked(full), [unpacked(source) for source in sources]
    found = {one.name: one for one in compare(full, grouped).tensors}
    assert list(found) == list(before)
    for name in EXPERT_NAMES:
        expected = np.stack([after[group][name][expert] for expert, group in enumerate(groups[0])])
        assert found[name].error == pytest.approx(relative(before[name], expected), rel=1e-5)
        assert found[name].types[1] == {"Q4_0": 3, "Q8_0": 3}
    swapped = compare(grouped, full)
    assert swapped.only == ([], [])
    assert {total.types for total in swapped.by_types} >= {("mixed", "F32")}
    assert compare(grouped, grouped).total.error == 0
    broken = write_grouped(
        tmp_path / "broken.gguf", sources, groups, change_map=lambda numbers: np.where(numbers == 0, 7, numbers)
    )
    with pytest.raises(InputError, match="do not make up all experts once"):
        compare(full, broken)


def test_what_cannot_be_compared_is_said(full: Path, tmp_path: Path) -> None:
    other = weights()
    other["token_embd.weight"] = other["token_embd.weight"][:10]
    other["blk.0.attn_norm.weight"][3] = np.inf
    other["blk.9.extra.weight"] = np.ones((2, WIDTH), np.float32)
    del other[EXPERT_NAMES[0]]
    found = compare(full, write(tmp_path / "other.gguf", other))
    notes = {one.name: one.note for one in found.tensors}
    assert notes["token_embd.weight"] == "shapes (20, 512) and (10, 512)"
    assert notes["blk.0.attn_norm.weight"] == "weights that are not finite"
    assert found.only == ([EXPERT_NAMES[0]], ["blk.9.extra.weight"])
    assert found.total.error == 0
    zero = write(tmp_path / "zero.gguf", {name: 0 * values for name, values in weights().items()})
    assert {one.note for one in compare(zero, full).tensors} == {"all zero in zero.gguf"}
    assert compare(zero, zero).total.error == 0
    assert compare(full, zero).total.error == pytest.approx(1)
