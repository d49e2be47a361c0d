"""Inference settings that memory depends on."""

from dataclasses import fields
from typing import Annotated, Final

from pydantic import Field

from mode_gguf.artifacts import Record
from mode_gguf.options import ExportOptions, FitOptions
from mode_gguf.vocabulary import KvType

BATCH: Final = 512
"""Tokens that llama.cpp computes at once, its default (`--ubatch-size`)."""


class FitSettings(Record):
    """Inference settings that decide what a text model shares a GPU's memory with.

    Attributes:
        context: tokens of the KV cache, llama-server's `--ctx-size`: all parallel sequences have them together.
        parallel: sequences answered at the same time, llama-server's `--parallel`.
        kv_type: of both halves of the cache.
        image_tokens: of the largest image; None for llama.cpp's limit.
        reserve: bytes.
        projector_type: of the projector's matrices.
    """

    context: Annotated[int, Field(gt=0, le=1 << 24)]
    parallel: Annotated[int, Field(gt=0, le=256)] = FitOptions.parallel
    kv_type: KvType = FitOptions.kv_type
    image_tokens: Annotated[int, Field(gt=0)] | None = None
    reserve: Annotated[int, Field(ge=0)] = FitOptions.reserve
    projector_type: str = ExportOptions.mmproj_type
    batch: Annotated[int, Field(gt=0)] = BATCH

    @classmethod
    def of(cls, options: FitOptions, projector_type: str) -> "FitSettings":
        """Settings from the options, which have a context."""
        values = {one.name: getattr(options, one.name) for one in fields(options)}
        return cls(projector_type=projector_type, **values)

    @property
    def cells_per_stream(self) -> int:
        """Cells of one sequence's KV cache: llama.cpp rounds up to 256, and gives parallel sequences equal parts."""
        return _padded(_padded(self.context) // self.parallel)

    @property
    def cells(self) -> int:
        return self.cells_per_stream * self.parallel

    def __str__(self) -> str:
        options = [f"--ctx {self.context}", f"--parallel {self.parallel}", f"--kv-type {self.kv_type}"]
        if self.image_tokens is not None:
            options.append(f"--image-tokens {self.image_tokens}")
        return " ".join(options)


def _padded(cells: int) -> int:
    return -(-cells // 256) * 256
