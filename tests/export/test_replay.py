"""Our files against llama.cpp's own packing: the same plan and importance matrix must give the same bytes."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import read_imatrix, write_imatrix
from mode_gguf.export.tensor_types import tensor_types_text
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from tests.kernels.ggml_oracle import quantize

OURS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")
SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
LIBGGMLS = ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")

Files = tuple[Path, Path, dict[str, QuantType]]


@pytest.fixture(scope="module", params=[OURS, SMALL_BLOCKS, LIBGGMLS], ids=["packed by us", "32-block", "libggml's"])
def files(pico: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Files:
    """Our quantized file with all these types in it, its importance matrix, and its types."""
    quantized: tuple[str, ...] = request.param
    folder = tmp_path_factory.mktemp("replay")
    checkpoint = Checkpoint.open(pico)
    random = np.random.default_rng(0)
    matrices = [tensor for tensor in text_tensors(checkpoint) if tensor.role is not Role.KEEP]
    experts_last = sorted(matrices, key=lambda tensor: tensor.role is Role.EXPERT)
    types = {tensor.name: QUANT_TYPES[quantized[i % len(quantized)]] for i, tensor in enumerate(experts_last)}
    assert {types[tensor.name].name for tensor in matrices if tensor.role is Role.EXPERT} == set(quantized)
    entries = {}
    for tensor in matrices:
        if tensor.role is not Role.EMBEDDING:
            counts = random.integers(0, 50, tensor.n_experts)
            sums = random.gamma(0.3, 2.0, (tensor.n_experts, tensor.row_width)) * counts[:, None]
            entries[tensor.name] = (sums, counts)
    imatrix = folder / "imatrix-pico.gguf"
    write_imatrix(imatrix, entries, ["random"], chunk_count=1, chunk_size=512)
    ours = folder / "ours.gguf"
    write_text_model(ours, checkpoint, TensorPacking(types, read_imatrix(imatrix)), threads=2)
    return ours, imatrix, types


def test_bytes_are_those_of_ggml(pico: Path, files: Files) -> None:
    ours, imatrix, types = files
    packed = {tensor.name: tensor.data for tensor in GGUFReader(ours).tensors}
    importance = read_imatrix(imatrix)
    for tensor in text_tensors(Checkpoint.open(pico)):
        if tensor.role is Role.KEEP:
            continue
        found = packed[tensor.name].reshape(tensor.n_experts, -1)
        expected = np.stack([_by_ggml(tensor, e, types, importance) for e in range(tensor.n_experts)])
        np.testing.assert_array_equal(found, expected, err_msg=f"{tensor.name} {types[tensor.name].name}")


def _by_ggml(
    tensor: SourceTensor, expert: int, types: dict[str, QuantType], importance: Mapping[str, np.ndarray]
) -> np.ndarray:
    weights = importance.get(tensor.name)
    row = None if weights is None else np.ascontiguousarray(weights[expert])
    return quantize(as_float32(tensor.read(expert)), types[tensor.name].name, row).ravel()


def test_stock_llama_quantize_replays_the_plan(pico: Path, files: Files, tmp_path: Path) -> None:
    program = shutil.which("llama-quantize", path=os.environ.get("MODE_GGUF_LLAMA_CPP"))
    if program is None:
        pytest.skip("no llama-quantize on the PATH or in the folder MODE_GGUF_LLAMA_CPP")
    ours, imatrix, types = files
    checkpoint = Checkpoint.open(pico)
    full, stock, tensor_types = tmp_path / "bf16.gguf", tmp_path / "stock.gguf", tmp_path / "tensor-types.txt"
    write_text_model(full, checkpoint, TensorPacking(dict.fromkeys(types, QUANT_TYPES["BF16"])))
    tensor_types.write_text(tensor_types_text(types))
    command: list[str | Path] = [program, "--pure", "--imatrix", imatrix, "--tensor-type-file", tensor_types]
    command += [full, stock, "Q2_K", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    expected = {tensor.name: tensor for tensor in GGUFReader(stock).tensors}
    for tensor in GGUFReader(ours).tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data, err_msg=tensor.name)
