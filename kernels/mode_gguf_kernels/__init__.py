"""Packing kernels: matrices to GGUF's K-quants and Q8_0 and back, byte for byte what libggml writes, many times faster;
or, if asked, with less error than libggml's.

The exact searches for scales and levels are ggml's (MIT licence), see `search`; `refine` and `gptq` have our own.
Nothing is compiled before the first call for a type; compiled kernels are kept on disk, see `compilation`.

The kernels need nothing but NumPy and Numba. On x86-64 they use AVX-512 or AVX2; elsewhere LLVM makes what it can of
16 lanes.
"""

from mode_gguf_kernels.feedback_rounding import FEEDBACK_TYPES, Feedback, round_again
from mode_gguf_kernels.matrix import Kernels
from mode_gguf_kernels.registry import TYPES, NonFiniteError, PackingError, Refinement, pack, unpack

__all__ = [
    "FEEDBACK_TYPES",
    "TYPES",
    "Feedback",
    "Kernels",
    "NonFiniteError",
    "PackingError",
    "Refinement",
    "pack",
    "round_again",
    "unpack",
]
