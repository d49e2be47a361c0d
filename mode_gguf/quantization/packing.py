"""Packing settings of the types that leave a choice: like ggml, or with less error."""

from typing import Final

from mode_gguf.options import Packing
from mode_gguf_kernels import Refinement

DEFAULT_PACKING: Final = Packing()
EXACT: Final = Packing("exact")


def refinement_of(packing: Packing) -> Refinement | None:
    """The kernels' refinement settings; None for libggml's own search."""
    return Refinement(packing.effort, packing.size_power, packing.unbiased) if packing.mode == "refined" else None
