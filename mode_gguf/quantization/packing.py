"""How weights are packed to the types that leave a choice: like ggml, or with less error."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mode_gguf.errors import UsageError
from mode_gguf_kernels import Refinement
from mode_gguf_kernels.registry import Effort

Mode: TypeAlias = Literal["exact", "refined"]
MODES: tuple[Mode, ...] = get_args(Mode)
EFFORTS: tuple[Effort, ...] = get_args(Effort)

Rounding: TypeAlias = Literal["nearest", "feedback"]
"""`nearest`: every weight by itself, as llama.cpp does; `feedback`: a row's errors make up for each other."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How types are packed that leave a choice. Searching is for K-quants; libggml's types are scaled at most.

    Attributes:
        mode: `exact` writes the bytes that libggml would; `refined` searches for scales, mins and levels of less error.
        effort: how long `refined` searches.
        size_power: to `refined`, a weight's squared error counts importance * (variance + x^2) ^ size_power, with x the
            weight and variance the mean square of its super-block; a multiple of 0.5.
        unbiased: whether `refined` scales super-blocks so that outputs keep their size.

    Raises:
        UsageError: no such mode, effort or power.
    """

    mode: Mode = "refined"
    effort: Effort = "default"
    size_power: float = 0.0
    unbiased: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"packing {self.mode!r}: choose from {', '.join(MODES)}")
        if self.effort not in EFFORTS:
            raise UsageError(f"packing effort {self.effort!r}: choose from {', '.join(EFFORTS)}")
        if not 0 <= self.size_power <= 4 or 2 * self.size_power % 1:
            raise UsageError(f"size power {self.size_power:g}: 0, 0.5, 1, ... 4 expected")

    @property
    def is_unbiased(self) -> bool:
        """Whether what is packed is scaled so that outputs keep their size."""
        return self.mode == "refined" and self.unbiased

    @property
    def refinement(self) -> Refinement | None:
        """What the kernels are told."""
        return Refinement(self.effort, self.size_power, self.unbiased) if self.mode == "refined" else None

    @property
    def default_rounding(self) -> Rounding:
        """With feedback, unless the bytes are to be libggml's."""
        return "feedback" if self.mode == "refined" else "nearest"


DEFAULT_PACKING = Packing()
EXACT = Packing("exact")
