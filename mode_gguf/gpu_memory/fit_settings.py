"""How a model is going to be run, as far as memory depends on it."""

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field

from mode_gguf.artifacts import Record

KvType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
"""Types of the KV cache that every build of llama.cpp has flash attention for."""

BATCH: Final = 512
"""Tokens that llama.cpp computes at once, its default (`--ubatch-size`)."""
RESERVE: Final = 1 << 30
"""Bytes left alone: what the driver and its libraries take for a process, and what else is shown on the screen. It is
also the margin that llama-server wants to see free before it moves parts of a model off the GPU."""


class FitSettings(Record):
    """What a text model shares a GPU's memory with.

    Attributes:
        context: tokens of the KV cache, llama-server's `--ctx-size`: all parallel sequences have them together.
        parallel: sequences answered at the same time, llama-server's `--parallel`.
        kv_type: of both halves of the cache.
        image_tokens: of the largest picture; None for as many as llama.cpp lets through.
        reserve: bytes.
        projector_type: of the projector's matrices.
    """

    context: Annotated[int, Field(gt=0, le=1 << 24)]
    parallel: Annotated[int, Field(gt=0, le=256)] = 1
    kv_type: KvType = "f16"
    image_tokens: Annotated[int, Field(gt=0)] | None = None
    reserve: Annotated[int, Field(ge=0)] = RESERVE
    projector_type: str = "F16"
    batch: Annotated[int, Field(gt=0)] = BATCH

    @property
    def cells_per_stream(self) -> int:
        """Of the KV cache, for one sequence: llama.cpp rounds up to 256, and gives parallel sequences equal parts."""
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
