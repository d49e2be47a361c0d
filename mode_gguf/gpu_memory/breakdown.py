"""GPU memory breakdown of a model, beside its text model's tensors.

All of it is computed from metadata: llama.cpp's KV cache has a size per cell, and its compute buffers are those of its
graphs, which are walked as it walks them (`graph_allocator`). Checks of the result: docs/design/gpu-memory.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any

from gguf import Keys

from mode_gguf.artifacts import Record
from mode_gguf.errors import UsageError
from mode_gguf.gpu_memory.fit_settings import FitSettings
from mode_gguf.gpu_memory.model_graphs import Batch, EncoderShape, ModelGraphs, TextShape
from mode_gguf.quantization.types import QUANT_TYPES

_PADDING_PER_TENSOR = 128 + 512 * 34 // 32
"""CUDA aligns tensors to 128 bytes and pads the last row of a quantized one to a multiple of 512 weights."""


class MemoryLine(Record):
    """One line of the breakdown; those that are not on the GPU are there for completeness."""

    name: str
    bytes: int
    what: str
    on_gpu: bool = True


class MemoryBreakdown(Record):
    """GPU memory by use.

    Attributes:
        memory: bytes of the GPU.
        settings: that lines depend on.
        lines: those on the GPU, the text model last, then the others.
    """

    memory: int
    settings: FitSettings
    lines: tuple[MemoryLine, ...]

    @property
    def used(self) -> int:
        """Bytes on the GPU, the reserve included."""
        return sum(line.bytes for line in self.lines if line.on_gpu)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes and graphs of a model that memory depends on, tensors' types aside."""

    graphs: ModelGraphs
    text: TextShape
    encoder: EncoderShape
    text_tensors: int
    projector_bytes: int
    trained_context: int

    @classmethod
    def of(
        cls,
        graphs: ModelGraphs | None,
        architecture: str,
        text: Mapping[str, Any],
        projector: Mapping[str, Any],
        *,
        vocabulary: int,
        text_tensors: int,
        projector_bytes: int,
    ) -> "ModelShape":
        """The shape given by the metadata of the two GGUF files.

        Args:
            graphs: the family's; None where they are not known.
            architecture: general.architecture of the text model.

        Raises:
            UsageError: the graphs are not known.
        """
        if graphs is None:
            raise UsageError(f"--fit is not known for {architecture} yet; give --size or --bpw")
        return cls(
            graphs=graphs,
            text=graphs.text_shape(text, vocabulary),
            encoder=graphs.encoder_shape(projector),
            text_tensors=text_tensors,
            projector_bytes=projector_bytes,
            trained_context=int(text[Keys.LLM.CONTEXT_LENGTH.format(arch=architecture)]),
        )


def memory_lines(model: ModelShape, fit: FitSettings, groups: int = 1) -> list[MemoryLine]:
    """Lines of the breakdown for all but the text model's tensors.

    Args:
        groups: most groups that a layer's experts are stored in, where they have a type each.

    Raises:
        UsageError: the KV cache cannot have this type.
    """
    text, batch = model.text, text_batch(model.text, fit, groups)
    image_tokens = min(fit.image_tokens or model.graphs.image_tokens, fit.cells_per_stream)
    side = image_side(model.encoder, image_tokens)
    buffers = {
        "KV cache": (
            kv_bytes(text, fit),
            f"{fit.cells} cells x {text.layers} layers, {fit.kv_type}{_beyond(model, fit)}",
        ),
        "text compute buffer": (model.graphs.text(text, batch).buffer_bytes(), f"{batch.tokens} tokens at once"),
        "image encoder": (model.projector_bytes, f"the projector file, {fit.projector_type}"),
        "image compute buffer": (
            model.graphs.encoder(model.encoder, side, side).buffer_bytes(),
            f"a picture of {image_tokens} tokens",
        ),
        "kernels' workspace": (
            _text_workspace(text, batch) + _encoder_workspace(model.encoder, side**2),
            "what CUDA kernels convert and collect",
        ),
        "padding of tensors": (_PADDING_PER_TENSOR * model.text_tensors * groups, f"{model.text_tensors} tensors"),
        "reserve": (fit.reserve, "driver, its libraries, the screen"),
    }
    lines = [MemoryLine(name=name, bytes=size, what=what) for name, (size, what) in buffers.items()]
    output = 4 * text.vocabulary * fit.parallel
    return [*lines, MemoryLine(name="output buffer", bytes=output, what="logits, in system memory", on_gpu=False)]


def _beyond(model: ModelShape, fit: FitSettings) -> str:
    longer = fit.cells_per_stream > model.trained_context
    return f"; the model was trained for {model.trained_context} tokens" if longer else ""


def kv_bytes(text: TextShape, fit: FitSettings) -> int:
    """Bytes of K and V in all layers.

    Raises:
        UsageError: their rows are no multiple of the type's block.
    """
    kv_type = QUANT_TYPES[fit.kv_type.upper()]
    width = text.kv_heads * text.head_dim
    if not kv_type.fits(text.head_dim):
        raise UsageError(
            f"--kv-type {fit.kv_type} stores {kv_type.block_size} values together, and heads have {text.head_dim}: "
            "give --kv-type f16"
        )
    return 2 * text.layers * fit.cells * kv_type.row_bytes(width)


def text_batch(text: TextShape, fit: FitSettings, groups: int = 1, *, gpu: bool = True) -> Batch:
    """The batch that llama-server reserves its compute buffer for: one token of output per sequence.

    Args:
        gpu: False for what the CPU takes, whose flash attention reads a quantized cache as it is.
    """
    tokens = ceil(min(fit.batch, fit.context) / fit.parallel) * fit.parallel
    quantized = fit.kv_type != "f16"
    return Batch(tokens, fit.cells, fit.parallel, fit.parallel, quantized, quantized and gpu, groups)


def image_side(encoder: EncoderShape, tokens: int) -> int:
    """Patches along each side of the smallest square image of at least so many tokens."""
    return encoder.merge * (isqrt(tokens - 1) + 1)


def _text_workspace(text: TextShape, batch: Batch) -> int:
    """Inputs of matrix products, quantized to 36 bytes per 32 values, and partial results of flash attention."""
    rows = batch.tokens * text.experts_used
    products = rows * max(text.hidden, text.expert_width, text.heads * text.head_dim // text.experts_used) * 36 // 32
    return products + 16 * batch.tokens * text.heads * (2 + text.head_dim // 2)


def _encoder_workspace(encoder: EncoderShape, patches: int) -> int:
    """Inputs and results of one matrix product in F16, which cuBLAS wants."""
    merged = encoder.hidden * encoder.merge**2
    widest = max(encoder.hidden + max(3 * encoder.hidden, encoder.width), 2 * merged // encoder.merge**2)
    return 2 * patches * widest
