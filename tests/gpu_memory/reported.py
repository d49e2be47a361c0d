"""Allocations that llama.cpp itself reports: lines of its log, in MiB."""

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.llama_cpp import c_api

MIB = 1 << 20
FLASH_ATTENTION_ON = 1
GGML_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
_SIZE = re.compile(r"= *([0-9.]+) MiB")


@contextmanager
def lines_of_llama_cpp() -> Iterator[list[str]]:
    """Every line from now on."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, collector = logging.getLogger("mode_gguf.libllama"), Collector()
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


def sizes(lines: list[str], text: str) -> list[float]:
    """MiB of all lines that hold `text`."""
    return [float(_SIZE.search(line)[1]) for line in lines if text in line and _SIZE.search(line)]  # type: ignore[index]


@contextmanager
def loaded(path: Path, *, weights: bool = True, lib: ctypes.CDLL | None = None) -> Iterator[int]:
    """A text model in llama.cpp, by default the embedded one; without weights only what it would take is known."""
    lib = lib or c_api.library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    if not weights:
        params.no_alloc = True
        params.load_mode = 0
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    assert model, c_api.last_errors()
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def context_sizes(model: int, fit: FitSettings, lib: ctypes.CDLL | None = None) -> tuple[float, float, float]:
    """MiB of KV cache, compute buffer and output buffer, in a context made as llama-server makes it."""
    lib = lib or c_api.library()
    params = lib.llama_context_default_params()
    params.n_ctx = fit.context
    params.n_ubatch = fit.batch
    params.n_seq_max = params.n_outputs_max = fit.parallel
    params.flash_attn_type = FLASH_ATTENTION_ON
    params.type_k = params.type_v = GGML_TYPES[fit.kv_type]
    with lines_of_llama_cpp() as lines:
        context = lib.llama_init_from_model(model, params)
        assert context, c_api.last_errors()
        lib.llama_free(context)
    (cache,), (compute,), (output,) = (
        sizes(lines, text) for text in ("cells", "compute buffer size =", "output buffer size")
    )
    return cache, compute, output


def encoder_sizes(mmproj: Path) -> tuple[float, float]:
    """MiB of the image encoder's weights, and of its compute buffer for a picture of 46 x 46 tokens, llama.cpp's
    largest at the start."""
    lib = c_api.library()
    params = lib.mtmd_context_params_default()
    params.use_gpu = False
    params.flash_attn_type = FLASH_ATTENTION_ON
    with lines_of_llama_cpp() as lines:
        encoder = lib.mtmd_init_from_file(os.fsencode(mmproj), None, params)
        assert encoder, c_api.last_errors()
        lib.mtmd_free(encoder)
    (compute,) = sizes(lines, "compute buffer size")
    (weights,) = (
        float(found[1]) for line in lines if (found := re.search(r"model size: +([0-9.]+) MiB", line)) is not None
    )
    return weights, compute
