"""What storing a reference's distributions in 16 bits costs: in steps, as we do, and as float16.

    python experiments/compare_reference_storage.py REFERENCE CANDIDATE SAMPLES [--vocabulary N]

REFERENCE and CANDIDATE are text GGUFs, SAMPLES a held-out folder. For both ways: bytes per log-probability as stored
and after zlib (low and high bytes apart), KL(stored || reference), which should be 0, and the KL divergence of the
candidate beside the true one. --vocabulary fills both models' vocabularies up with tokens of chance.
"""

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from experiment_command import command_parser
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.validation.distributions import normalised, pack_in_16_bits, unpack_distributions
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.questions import load_held_out
from mode_gguf.validation.reference import RunSettings, score_text

Array: TypeAlias = np.ndarray


def steps(log_probs: Array) -> tuple[Array, Array]:
    """What is stored, and what is read back: our way."""
    packed = pack_in_16_bits(log_probs)
    return packed["steps"], unpack_distributions(packed)


def float16(log_probs: Array) -> tuple[Array, Array]:
    stored = log_probs.astype(np.float16)
    return stored, stored.astype(np.float32)


WAYS: Final[dict[str, Callable[[Array], tuple[Array, Array]]]] = {
    "uint16, 32 nats below the top (ours)": steps,
    "float16": float16,
}


def logits_of(path: Path, texts: tuple[str, ...]) -> tuple[Array, list[int]]:
    """Logits of all scored positions, and the tokens that came there."""
    tokens: list[int] = []
    rows = []
    with LlamaModel(path) as model:
        for text in texts:
            scored, logits = score_text(model, text, RunSettings())
            tokens += scored
            rows.append(logits)
    return np.concatenate(rows), tokens


def enlarged(logits: Array, vocabulary: int, other: Array | None = None) -> Array:
    """`logits` with unlikely tokens added, as spread as the others; with `other`, a tenth of that away from its."""
    rng = np.random.default_rng(0 if other is None else 1)
    more = vocabulary - logits.shape[1]
    mean, spread = logits.mean(axis=1, keepdims=True), logits.std(axis=1, keepdims=True)
    noise = rng.standard_normal((len(logits), more), dtype=np.float32)
    added = mean - spread + spread * noise if other is None else other[:, -more:] + 0.1 * spread * noise
    return np.concatenate([logits, added.astype(np.float32)], axis=1)


def compressed_share(stored: Array) -> float:
    """Bytes after zlib over bytes before it, high and low bytes apart."""
    planes = np.ascontiguousarray(stored).view(np.uint8).reshape(-1, 2)
    return sum(len(zlib.compress(planes[:, plane].tobytes(), 1)) for plane in (0, 1)) / planes.size


def main() -> None:
    """Measure and print."""
    parser = command_parser(__doc__)
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--vocabulary", type=int, default=0)
    parser.add_argument("--texts", type=int, default=20, help="texts to use at most")
    arguments = parser.parse_args()
    texts = load_held_out(arguments.samples).texts[: arguments.texts]
    p, tokens = logits_of(arguments.reference, texts)
    q, _ = logits_of(arguments.candidate, texts)
    if arguments.vocabulary > p.shape[1]:
        positions = slice(0, 512)
        p, q, tokens = p[positions], q[positions], tokens[positions]
        p = enlarged(p, arguments.vocabulary)
        q = enlarged(q, arguments.vocabulary, other=p)
    log_probs = normalised(p)
    truth = compare(log_probs, q, tokens).kl.mean()
    spread = float((log_probs.max(axis=1) - log_probs.min(axis=1)).max())
    table = Table("", "bytes", "with zlib", "KL(stored || reference), mean / largest", "KL of the candidate / true")
    for name, way in WAYS.items():
        stored, back = way(log_probs)
        own, found = compare(back, p, tokens).kl, compare(back, q, tokens).kl.mean()
        share = compressed_share(stored)
        table.add_row(name, "2", f"{2 * share:.2f}", f"{own.mean():.1e} / {own.max():.1e}", f"{found / truth:.6f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{len(tokens)} positions, {p.shape[1]} tokens, {spread:.1f} nats from the most to the least likely; true KL "
        f"{truth:.6f}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
