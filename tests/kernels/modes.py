"""The ways to pack that tests and benchmarks run through: one more of them is one more line in `MODES`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mode_gguf_kernels import TYPES, Refinement, pack
from mode_gguf_kernels.registry import Effort


@dataclass(frozen=True, slots=True)
class Mode:
    """Keyword options of `mode_gguf_kernels.pack` under a name, and the types that take them."""

    name: str
    types: tuple[str, ...]
    options: Mapping[str, Any]

    def pack(
        self,
        matrix: np.ndarray,
        type_name: str,
        importance: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """`mode_gguf_kernels.pack` with this mode's options."""
        return pack(matrix, type_name, importance, out=out, **self.options)

    def without_gain(self) -> "Mode":
        """The mode before super-blocks are scaled to keep the size of outputs, after levels are chosen."""
        if "refinement" not in self.options:
            return self
        biased = replace(self.options["refinement"], unbiased=False)
        return Mode(f"{self.name}, biased", self.types, {"refinement": biased})


EXACT = Mode("exact", tuple(TYPES), {})
"""The mode of exact packing, byte for byte what libggml writes."""

EFFORTS: tuple[tuple[str, Effort], ...] = (("refined, fast", "fast"), ("refined", "default"), ("refined, max", "max"))
REFINED = tuple(
    Mode(name, tuple(name for name in TYPES if TYPES[name].searches), {"refinement": Refinement(effort)})
    for name, effort in EFFORTS
)
"""Modes of refined packing, of less error than libggml's."""

MODES = (EXACT, *REFINED)
MODES_AND_TYPES = [(mode, type_name) for mode in MODES for type_name in mode.types]
"""Arguments of `pytest.mark.parametrize`, with `ids=mode_id`."""


def mode_id(value: object) -> str:
    """A test parameter's id."""
    return value.name if isinstance(value, Mode) else str(value)
