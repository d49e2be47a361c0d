"""GPU offload: placement of layers, tensors and KV cache; names and meanings are those of llama.cpp's options."""

import ctypes
import logging
from ctypes import c_float, c_void_p
from dataclasses import dataclass
from typing import Final

from mode_gguf.errors import UsageError
from mode_gguf.llama_cpp import c_api
from mode_gguf.options import PlacementOptions
from mode_gguf.vocabulary import SplitMode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offload:
    """Placement of a model on GPUs; everything else than the default needs a llama.cpp with a GPU backend.

    Attributes:
        n_gpu_layers: layers in GPU memory (`-ngl`); negative means all.
        split_mode: how several GPUs share a model (`-sm`).
        main_gpu: the one GPU of split mode `none`, and the one for intermediate results of `row` (`-mg`).
        tensor_split: the share of each GPU (`-ts`), such as (3, 1); empty leaves it to llama.cpp.
        devices: the devices to use (`-dev`), by llama.cpp's names; empty means all GPUs.
        override_tensors: (regular expression, buffer type) pairs (`-ot`), such as ("exps", "CPU") for experts in main
            memory; the first that matches a tensor's name decides.
        kv_cache: whether the KV cache and attention are where their layers are (not `-nkvo`).
        projector: whether the image encoder is on the GPU, if there are layers on it (not `--no-mmproj-offload`).
    """

    n_gpu_layers: int = 0
    split_mode: SplitMode = "layer"
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()
    devices: tuple[str, ...] = ()
    override_tensors: tuple[tuple[str, str], ...] = ()
    kv_cache: bool = True
    projector: bool = True


ON_CPU: Final = Offload()


def placement_of(options: PlacementOptions) -> Offload:
    """The placement that options ask for.

    Raises:
        UsageError: shares that are none, or an override without its buffer.
    """
    shares = options.tensor_split
    if shares and not (all(0 <= share < float("inf") for share in shares) and any(shares)):
        raise UsageError(f"--tensor-split: shares of 0 or more expected, not all 0, {shares} found")
    return Offload(
        n_gpu_layers=options.n_gpu_layers,
        split_mode=options.split_mode,
        main_gpu=options.main_gpu,
        tensor_split=shares,
        devices=options.devices,
        override_tensors=tuple(map(_override, options.override_tensors)),
        kv_cache=options.kv_offload,
        projector=options.mmproj_offload,
    )


def _override(text: str) -> tuple[str, str]:
    pattern, _, buffer = text.rpartition("=")
    if not pattern or not buffer:
        raise UsageError(f"--override-tensor: REGEX=BUFFER expected, such as exps=CPU, {text!r} found")
    return pattern, buffer


def apply_to_model(offload: Offload, params: c_api.ModelParams, lib: ctypes.CDLL) -> list[object]:
    """Set the fields of `params`, the parameters of a model that `lib` is to load.

    Returns:
        What `params` points to; to be kept for as long as the model lives.

    Raises:
        UsageError: a device or buffer type that `lib` does not have here, or more shares than it knows devices.
    """
    if offload.n_gpu_layers != 0 and not lib.llama_supports_gpu_offload():
        logger.warning("this llama.cpp has no GPU backend, or finds no GPU: everything is computed on the CPU")
    params.n_gpu_layers = offload.n_gpu_layers
    params.split_mode = c_api.SPLIT_MODES[offload.split_mode]
    params.main_gpu = offload.main_gpu
    devices = _devices(lib)
    kept: list[object] = []
    if offload.tensor_split:
        max_devices = lib.llama_max_devices()
        if len(offload.tensor_split) > max_devices:
            raise UsageError(
                f"--tensor-split: {len(offload.tensor_split)} shares, llama.cpp knows {max_devices} devices at most"
            )
        shares = (c_float * max_devices)(*offload.tensor_split)
        params.tensor_split = ctypes.cast(shares, c_void_p)
        kept.append(shares)
    if offload.devices:
        chosen = [_named(devices, name, "--device") for name in offload.devices]
        array = (c_void_p * (len(chosen) + 1))(*chosen, None)
        params.devices = ctypes.cast(array, c_void_p)
        kept.append(array)
    if offload.override_tensors:
        buffers = _buffer_types(lib, devices)
        pairs = [
            c_api.BufferOverride(pattern.encode(), _named(buffers, buffer, "--override-tensor"))
            for pattern, buffer in offload.override_tensors
        ]
        overrides = (c_api.BufferOverride * (len(pairs) + 1))(*pairs, c_api.BufferOverride(None, None))
        params.tensor_buft_overrides = ctypes.cast(overrides, c_void_p)
        kept.append(overrides)
    return kept


def _devices(lib: ctypes.CDLL) -> dict[str, int]:
    """llama.cpp's devices by name."""
    handles = [lib.ggml_backend_dev_get(number) for number in range(lib.ggml_backend_dev_count())]
    return {lib.ggml_backend_dev_name(handle).decode(): handle for handle in handles}


def _buffer_types(lib: ctypes.CDLL, devices: dict[str, int]) -> dict[str, int]:
    """The buffer type that each device stores tensors in, by name."""
    handles = map(lib.ggml_backend_dev_buffer_type, devices.values())
    return {lib.ggml_backend_buft_name(handle).decode(): handle for handle in handles if handle}


def _named(known: dict[str, int], name: str, option: str) -> int:
    if name not in known:
        raise UsageError(f"{option}: {name} is none of what this llama.cpp has here: {', '.join(known)}")
    return known[name]
