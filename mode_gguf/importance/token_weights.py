"""Token weights: the effect of an error at a matrix's output on predictions, per token.

The squared norm of the gradient at the output (see `fisher_imatrix`), which weighs the second moments that rounding
with feedback needs. One number per token and matrix is little; the moments themselves are too large to be kept.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mode_gguf import __version__
from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.errors import InputError
from mode_gguf.forward.inputs import ModelInputs


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights of the tokens of all samples, one sample after the other.

    Attributes:
        fingerprint: of the checkpoint.
        tokens: `tokens_digest` of the samples.
        weights: float32 (N,) by GGUF name of a dense matrix or the output head (zero where nothing is scored), and by
            `experts_entry` for a layer's routed experts: there at the output of the whole block, so that a token of an
            expert weighs that times its squared routing weight.
    """

    fingerprint: str
    tokens: str
    weights: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, atomically."""
        metadata = {
            "kind": "token-weights",
            "tool_version": __version__,
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
        }
        write_arrays(path, self.weights, metadata)

    @classmethod
    def load(cls, path: Path) -> "TokenWeights":
        """Read the file that `save` wrote.

        Raises:
            InputError: the file is missing, or is no such file of this version.
        """
        arrays, metadata = read_arrays(path, "token-weights")
        return cls(metadata["fingerprint"], metadata["tokens"], arrays)

    def check_samples(self, inputs: Sequence[ModelInputs], path: Path) -> None:
        """Check that these are the samples that were weighed.

        Raises:
            InputError: they are not; `path` is where the weights were read from.
        """
        if tokens_digest([one.input_ids for one in inputs]) != self.tokens:
            raise InputError(
                f"{path}: made from other samples than these; give the options that `sensitivity` was given, or run it "
                "again"
            )


def experts_entry(layer: int) -> str:
    """Name of the weights of a layer's routed experts."""
    return f"blk.{layer}.ffn_exps"


def tokens_digest(input_ids: Sequence[Tensor]) -> str:
    """Digest of the samples' tokens, each int64 (S,), and their order."""
    digest = hashlib.sha256()
    for ids in input_ids:
        digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    return digest.hexdigest()[:16]
