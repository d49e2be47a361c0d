"""The transformers model of a checkpoint with at most one decoder layer's weights in memory."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from mode_gguf.architectures import ModelFamily, find_family, text_tensors
from mode_gguf.architectures.tensors import Array, Order, Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, MissingResourceError, UsageError, foreign_errors
from mode_gguf.forward.converted_weights import ConvertedWeights, as_tensor
from mode_gguf.forward.distributed import local_rank
from mode_gguf.forward.hooks import ATTENTION, EXPERTS
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.model_config import model_config

TEXT_MODEL = "model.language_model"
"""Name of the text model's module in transformers, for every supported family."""

FINAL_NORM = f"{TEXT_MODEL}.norm"
"""Name of the norm between a supported family's last layer and its output head."""


class Reordered(nn.Module):
    """A linear layer whose weight is in the order of its GGUF tensor, in the place of one in the checkpoint's.

    Statistics, gradients and packed weights of `linear` then have columns and rows as they are stored.
    """

    def __init__(self, linear: nn.Module, order: Order, device: torch.device) -> None:
        super().__init__()
        self.linear = linear
        # No buffers: they are neither stored nor initialised.
        self._columns = None if order.columns is None else torch.from_numpy(order.columns).to(device)
        self._rows = None if order.rows is None else torch.from_numpy(np.argsort(order.rows)).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the linear layer in the checkpoint's order."""
        if self._columns is not None:
            x = x[..., self._columns]
        output: torch.Tensor = self.linear(x)
        return output if self._rows is None else output[..., self._rows]


def choose_device(device: str) -> torch.device:
    """The device named `auto` (CUDA where there is one), `cpu` or `cuda`; each process of several has a GPU of its own.

    Raises:
        UsageError: another name, or more processes than GPUs.
        MissingResourceError: `cuda`, and there is none.
    """
    if device not in {"auto", "cpu", "cuda"}:
        raise UsageError(f"unknown device {device!r}: choose from auto, cpu, cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise MissingResourceError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    if not available or device == "cpu":
        return torch.device("cpu")
    index = local_rank()
    if index is not None and index >= torch.cuda.device_count():
        raise UsageError(
            f"process {index} of this machine has no GPU of its own, torch finds {torch.cuda.device_count()}: start as "
            "many processes as there are GPUs (--nproc-per-node), or use --device cpu"
        )
    return torch.device("cuda") if index is None else torch.device("cuda", index)


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """The model on one device: everything but the decoder layers resident, those on the meta device until loaded.

    Attributes:
        model: Hugging Face's module, in eval mode, with the recorded experts and attention functions selected.
        layers: its decoder layers.
        tensors: the text tensors of the checkpoint.
        device: where weights and activations lie.
        dtype: of weights and activations.
        linears: names of the modules of dense matrices and of the output head, by their tensors' names.
        reordered: tensors of the matrices in `Reordered`, by the names of those parameters.
        text_model: name of the module with the decoder layers.
        converted: sources of parameters where no family names them.
    """

    checkpoint: Checkpoint
    family: ModelFamily
    model: nn.Module
    layers: Sequence[nn.Module]
    tensors: Sequence[SourceTensor]
    device: torch.device
    dtype: torch.dtype
    linears: Mapping[str, str]
    reordered: Mapping[str, SourceTensor]
    text_model: str = TEXT_MODEL
    converted: ConvertedWeights | None = None

    def run(self, inputs: ModelInputs, **options: Any) -> Any:
        """The model's output for one sample, without gradients."""
        with torch.no_grad():  # every forward has a gradient mode of its own
            return self.model(**inputs.model_arguments(self.device, self.dtype), **options)

    def load_layer(self, index: int) -> None:
        """Read decoder layer `index` from the checkpoint."""
        for name, parameter in list(self.layers[index].named_parameters()):
            full = f"{self.text_model}.layers.{index}.{name}"
            self._set(full, self._weights(full, index, parameter.shape))

    def free_layer(self, index: int) -> None:
        """Forget the weights of decoder layer `index`."""
        for name, parameter in list(self.layers[index].named_parameters()):
            self._set(f"{self.text_model}.layers.{index}.{name}", torch.empty_like(parameter, device="meta"))

    @contextmanager
    def loaded_layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, for as long as the context lasts."""
        self.load_layer(index)
        try:
            yield self.layers[index]
        finally:
            self.free_layer(index)

    @contextmanager
    def without_logits(self, needed: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Context in which the output head records its input and computes nothing, unless it is `needed`.

        For forwards whose logits are not needed: over a vocabulary of 150,000 the head takes as long as several
        decoder layers, and its output more memory than anything else of a sample.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        compute = head.forward
        head.forward = lambda hidden: compute(hidden) if needed() else hidden[..., :0]
        try:
            yield
        finally:
            del head.forward

    @property
    def embedding_scale(self) -> float:
        """Factor of the token embedding's rows in the text model."""
        return float(getattr(self.model.get_input_embeddings(), "scalar_embed_scale", 1.0))  # type: ignore[operator]

    @property
    def logit_cap(self) -> float | None:
        """Logit soft cap: logits become cap * tanh(z / cap) of the head's outputs z; None for none."""
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr, operator]
        return None if cap is None else float(cap)

    def logits_of(self, head_output: torch.Tensor) -> torch.Tensor:
        """Logits of the output head's outputs, soft-capped where the model does."""
        cap = self.logit_cap
        return head_output if cap is None else cap * torch.tanh(head_output / cap)

    def layer_tensors(self, index: int, role: Role) -> list[SourceTensor]:
        """The tensors of one role in layer `index`."""
        return [tensor for tensor in self.tensors if tensor.layer == index and tensor.role is role]

    def experts_module(self, index: int) -> Any:
        """The module that holds the fused experts of layer `index`; it must have some."""
        return next(module for module in self.layers[index].modules() if is_experts(module))

    def recorded_linears(self) -> dict[str, nn.Module]:
        """Linear modules of all dense matrices and the output head, by the activation their input is recorded under.

        Inputs, weights and outputs of each are in the order of its GGUF tensor.
        """
        modules = {
            tensor.activation: self.model.get_submodule(self.linears[tensor.name])
            for tensor in self.tensors
            if tensor.name in self.linears and tensor.activation is not None
        }
        return {name: one.linear if isinstance(one, Reordered) else one for name, one in modules.items()}

    def to_device(self, array: Array) -> torch.Tensor:
        """Checkpoint weights as a tensor of the model's device and dtype."""
        return as_tensor(array).to(self.device, self.dtype)

    def load_outside_layers(self) -> None:
        """Read everything that is not in a decoder layer, and give non-persistent buffers their values."""
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(f"{self.text_model}.layers."):
                self._set(name, self._weights(name, None, parameter.shape))
        self.model.tie_weights()  # type: ignore[operator]
        for name, buffer in self.model.named_buffers():
            if self.converted is not None:
                if name in self.converted:
                    self._set_buffer(name, self.converted.read(name).to(self.device, buffer.dtype))
                continue
            stored = self.family.layout.stored_name(name)
            if stored in self.checkpoint.tensors:
                self._set_buffer(name, as_tensor(self.checkpoint.read(stored)).to(self.device, buffer.dtype))

    def _weights(self, name: str, layer: int | None, shape: torch.Size) -> torch.Tensor:
        converted, layout = self.converted, self.family.layout
        stored = layout.stored_name(name) if converted is None else name
        from_layout = None
        if converted is None and layer is None:
            from_layout = layout.read_parameter(self.checkpoint, name)
        if converted is None and layer is not None and ".experts." in name:
            weights = self._experts(name.rpartition(".")[2], layer)
        elif name in self.reordered:
            weights = self.to_device(self.reordered[name].read(0))
        elif from_layout is not None:
            weights = self.to_device(from_layout)
        elif name == "lm_head.weight" and stored not in (self.checkpoint.tensors if converted is None else converted):
            weights = self.model.get_input_embeddings().weight  # type: ignore[operator]
        elif converted is not None:
            weights = converted.read(name).to(self.device, self.dtype)
        else:
            weights = self.to_device(self.checkpoint.read(stored))
        if weights.shape != shape:
            what = "tensor" if converted is None else "parameter"
            raise InputError(
                f"{self.checkpoint.path}: {what} {stored} has shape {tuple(weights.shape)}, its configuration says "
                f"{tuple(shape)}"
            )
        return weights

    def _experts(self, parameter: str, layer: int) -> torch.Tensor:
        """Fused experts in the module's layout, (E, 2I, H) or (E, H, I), however the checkpoint stores them."""
        by_projection = {tensor.projection: tensor for tensor in self.layer_tensors(layer, Role.EXPERT)}
        input_projections = ("gate_up",) if "gate_up" in by_projection else ("gate", "up")
        projections = {"gate_up_proj": input_projections, "down_proj": ("down",)}.get(parameter)
        if projections is None or not all(projection in by_projection for projection in projections):
            raise InputError(f"{self.checkpoint.path}: expert parameter {parameter} of layer {layer} is not known")
        parts = [by_projection[projection] for projection in projections]
        rows, n_in = sum(part.shape[1] for part in parts), parts[0].shape[2]
        fused = torch.empty(parts[0].n_experts, rows, n_in, dtype=self.dtype, device=self.device)
        for expert in range(parts[0].n_experts):
            start = 0
            for part in parts:
                fused[expert, start : start + part.shape[1]] = self.to_device(part.read(expert))
                start += part.shape[1]
        return fused

    def _set(self, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    def _set_buffer(self, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, value)


def open_streamed(checkpoint: Checkpoint, device: str = "auto", dtype: torch.dtype | None = None) -> StreamedModel:
    """Build the model of `checkpoint` without its decoder layers.

    Args:
        dtype: to compute in; None for float32 on the CPU, bfloat16 on CUDA.

    Raises:
        InputError: the family is not supported, or a tensor is missing or has another shape than configured.
        UsageError, MissingResourceError: see `choose_device`.
    """
    family, tensors = find_family(checkpoint), text_tensors(checkpoint)
    chosen = choose_device(device)
    dtype = dtype or (torch.bfloat16 if chosen.type == "cuda" else torch.float32)
    config = model_config(checkpoint, family)
    model = empty_model(checkpoint, config, dtype)
    model.eval()
    # Rotary frequencies and the like are computed, not stored: give them memory, then let the model's own
    # initialisation fill them, as from_pretrained does. Parameters are on the meta device, where it costs nothing.
    with foreign_errors(f"{checkpoint.path}: transformers cannot initialise the model", _HINT):
        for name, buffer in list(model.named_non_persistent_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.empty_like(buffer, device=chosen))
        model.initialize_weights()
    experts: list[Any] = [module for module in model.modules() if is_experts(module)]
    if any(m.is_transposed or m.has_bias or not m.has_gate or m.has_post_expert_norm for m in experts):
        raise InputError(f"{checkpoint.path}: experts of this form are not supported by calibration; {_HINT}")
    model.set_experts_implementation(EXPERTS)
    text_model, converted = TEXT_MODEL, None
    if checkpoint.base is None:
        model.set_attn_implementation({"text_config": ATTENTION})
        linears = _linears(model, family, tensors)
    else:
        converted = ConvertedWeights.of(checkpoint, model)
        converted.untie_other_head()
        text_model = _find_text_model(checkpoint, model, tensors)
        model.set_attn_implementation({"text_config": ATTENTION} if "text_config" in config.sub_configs else ATTENTION)
        stored = converted.stored_alone()
        linears = {
            tensor.name: stored[tensor.sources[0]].removesuffix(".weight")
            for tensor in tensors
            if tensor.role in (Role.DENSE, Role.OUTPUT) and tensor.sources[0] in stored
        }
    reordered = {}
    for tensor in tensors:
        if tensor.role is Role.DENSE and tensor.order is not None and tensor.name in linears:
            name = linears[tensor.name]
            model.set_submodule(name, Reordered(model.get_submodule(name), tensor.order, chosen))
            reordered[f"{name}.linear.weight"] = tensor
    layers = model.get_submodule(f"{text_model}.layers")
    streamed = StreamedModel(
        checkpoint, family, model, layers, tensors, chosen, dtype, linears, reordered, text_model, converted
    )
    streamed.load_outside_layers()
    return streamed


_HINT = "give llama-imatrix's file of this model with --calibration-from"


def empty_model(checkpoint: Checkpoint, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the meta device; text-only ones of a base GGUF included.

    Raises:
        InputError: transformers has none for this configuration, or none with fast attention.
    """
    auto = AutoModelForImageTextToText
    if checkpoint.base is not None and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = AutoModelForCausalLM
    with foreign_errors(f"{checkpoint.path}: transformers cannot make the model", _HINT), torch.device("meta"):
        return auto.from_config(config, dtype=dtype, attn_implementation="sdpa")


def _find_text_model(checkpoint: Checkpoint, model: nn.Module, tensors: Sequence[SourceTensor]) -> str:
    """Name of the module whose `layers` have the routed experts, one decoder layer per block of the base.

    Raises:
        InputError: there is none, or experts are in other layers than the base has them in.
    """
    found: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        match = _DECODER_LAYER.match(name) if is_experts(module) else None
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    wanted = {tensor.layer for tensor in tensors if tensor.role is Role.EXPERT}
    for text_model, layers in found.items():
        if layers == wanted:
            return text_model
    seen = ", ".join(f"{len(layers)} in {name}.layers" for name, layers in found.items()) or "none"
    raise InputError(
        f"{checkpoint.path}: the base has experts in {len(wanted)} layers, transformers' {type(model).__name__} has "
        f"fused experts in {seen}; {_HINT}"
    )


_DECODER_LAYER = re.compile(r"(.+)\.layers\.(\d+)\.")


def _linears(model: nn.Module, family: ModelFamily, tensors: Sequence[SourceTensor]) -> dict[str, str]:
    """Names of the modules that hold the weights of dense matrices and of the output head, by tensor name."""
    parameters = {family.layout.stored_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        tensor.name: parameters[tensor.sources[0]].removesuffix(".weight")
        for tensor in tensors
        if tensor.role in (Role.DENSE, Role.OUTPUT)
    }


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds fused experts that take part in transformers' experts interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "gate_up_proj")
