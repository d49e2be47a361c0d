"""That placement options arrive in llama.cpp; what it makes of them on a GPU is its own affair."""

import ctypes
import logging

import numpy as np
import pytest

from mode_gguf.errors import UsageError, ValidationError
from mode_gguf.llama_cpp import c_api
from mode_gguf.llama_cpp.gpu_offload import Offload, apply_to_model
from mode_gguf.llama_cpp.in_process import LlamaModel
from tests.validation.conftest import Files


def test_fields_of_the_c_api() -> None:
    lib = c_api.library()
    params = lib.llama_model_default_params()
    offload = Offload(
        n_gpu_layers=-1,
        split_mode="row",
        main_gpu=1,
        tensor_split=(3, 1),
        devices=("CPU",),
        override_tensors=(("exps", "CPU"), (r"blk\.1\.", "CPU")),
    )
    kept = apply_to_model(offload, params, lib)
    assert len(kept) == 3
    assert (params.n_gpu_layers, params.split_mode, params.main_gpu) == (-1, 2, 1)
    shares = ctypes.cast(params.tensor_split, ctypes.POINTER(ctypes.c_float))
    assert shares[0:3] == [3, 1, 0]
    devices = ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))
    assert lib.ggml_backend_dev_name(devices[0]) == b"CPU"
    assert devices[1] is None
    overrides = ctypes.cast(params.tensor_buft_overrides, ctypes.POINTER(c_api.BufferOverride))
    assert [overrides[i].pattern for i in range(3)] == [b"exps", rb"blk\.1\.", None]
    assert lib.ggml_backend_buft_name(overrides[1].buffer_type) == b"CPU"


def test_nothing_is_set_by_default() -> None:
    lib = c_api.library()
    params = lib.llama_model_default_params()
    assert apply_to_model(Offload(), params, lib) == []
    assert params.n_gpu_layers == 0
    assert params.tensor_split is None
    assert params.tensor_buft_overrides is None


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        (Offload(devices=("CUDA7",)), "--device: CUDA7 is none of what this llama.cpp has here: .*CPU"),
        (Offload(override_tensors=(("exps", "VRAM"),)), "--override-tensor: VRAM is none of .*CPU"),
        (Offload(tensor_split=(1,) * 1000), "--tensor-split: 1000 shares"),
    ],
)
def test_what_there_is_not(full: Files, offload: Offload, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LlamaModel(full.text, offload=offload)


def test_llama_cpp_reads_them(full: Files, caplog: pytest.LogCaptureFixture) -> None:
    """It refuses a GPU that is not there, and stores overridden tensors where it is told to."""
    with pytest.raises(ValidationError, match="invalid value for main_gpu: 99"):
        LlamaModel(full.text, offload=Offload(split_mode="none", main_gpu=99, devices=("CPU",)))
    with (
        caplog.at_level(logging.DEBUG, "mode_gguf.libllama"),
        LlamaModel(full.text, threads=1, offload=Offload(override_tensors=(("exps", "CPU"),))) as model,
    ):
        overridden = model.text_logits([1, 2, 3])
    assert any("exps" in record.getMessage() and "CPU" in record.getMessage() for record in caplog.records)
    with LlamaModel(full.text, threads=1) as model:
        np.testing.assert_allclose(model.text_logits([1, 2, 3]), overridden, atol=1e-5)


def test_layers_without_a_gpu_are_remarked(full: Files, caplog: pytest.LogCaptureFixture) -> None:
    if c_api.library().llama_supports_gpu_offload():
        pytest.skip("there is a GPU")
    with LlamaModel(full.text, threads=1, offload=Offload(n_gpu_layers=-1)):
        pass
    assert "no GPU backend" in caplog.text
