"""Digests of packed bytes for fixed weights, so that kernels can be proven where there is no libggml.

    python -m tests.kernels.golden > tests/kernels/golden.json

writes the table again from the kernels; `test_golden.py` then says whether libggml agrees. The weights come from
integer arithmetic and powers of two, exact everywhere, and not from a generator whose stream may change.
"""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np

from mode_gguf_kernels import unpack
from tests.kernels.modes import MODES, Mode

F = np.float32
TABLE = Path(__file__).with_suffix(".json")
ROWS, COLUMNS = 23, 512  # of each of the seven kinds of weights
PLAIN, WEIGHTED, UNPACKED = "without importance", "with importance", "unpacked"


def hashed(count: int, seed: int) -> np.ndarray:
    """uint64 (count,): splitmix64 of seed 2^32 + 0, 1, 2, ..."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def matrix() -> np.ndarray:
    """float32 (7 ROWS, COLUMNS): bell-shaped, heavy-tailed, sparse, ties in K-quants, ties in Q8_0, of all exponents,
    of any bits.
    """
    count = ROWS * COLUMNS
    drawn = hashed(count, 1)
    fields = [((drawn >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4)]
    bell = (np.sum(fields, axis=0) - 2 * 65535).astype(F)
    spread = hashed(count, 2)
    bits = spread.astype(np.uint32)
    bits = np.where(bits & 0x7F800000 == 0x7F800000, bits ^ 0x40000000, bits).astype(np.uint32)
    sections = (
        np.ldexp(bell, -22),
        np.ldexp(bell, (spread % np.uint64(24)).astype(np.int32) - 30),
        np.ldexp(bell, -17) * (spread % np.uint64(16) == 0),
        np.ldexp((drawn % np.uint64(7)).astype(F) - F(3), -1),
        np.where(np.arange(count) % 32 == 0, F(127), np.ldexp((drawn % np.uint64(255)).astype(F) - F(127), -1)),
        np.ldexp(bell, (hashed(count // 16, 3) % np.uint64(220)).astype(np.int32).repeat(16) - 120),
        bits.view(F),
    )
    return np.concatenate(sections).astype(F).reshape(-1, COLUMNS)


def importance() -> np.ndarray:
    """float32 (COLUMNS,): whole numbers below 2^24, one in seven of them 0."""
    drawn = hashed(COLUMNS, 4)
    return np.where(np.arange(COLUMNS) % 7 == 0, F(0), (drawn >> np.uint64(40)).astype(F))


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return sha256(array.tobytes()).hexdigest()


def digests(mode: Mode, type_name: str) -> dict[str, str]:
    """Digests of the fixed weights: packed without and with importance; the latter unpacked."""
    weighted = mode.pack(matrix(), type_name, importance())
    return {
        PLAIN: digest(mode.pack(matrix(), type_name)),
        WEIGHTED: digest(weighted),
        UNPACKED: digest(unpack(weighted, type_name, COLUMNS)),
    }


def table() -> dict[str, dict[str, dict[str, str]]]:
    """The digests on file, by mode and type."""
    stored: dict[str, dict[str, dict[str, str]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return stored


if __name__ == "__main__":
    print(json.dumps({mode.name: {name: digests(mode, name) for name in mode.types} for mode in MODES}, indent=2))
