"""Packed bytes against libggml's, on drawn weights: ten thousand super-blocks per type, or a million (`long`).

    MODE_GGUF_FUZZ_SEED=1 pytest -m long tests/kernels/test_fuzz.py

Each is packed without and with an importance. A failure says which draw it was and how to draw it again.
"""

import os

import numpy as np
import pytest

from mode_gguf_kernels import TYPES, pack
from tests.kernels import ggml_oracle, inputs

SEED = int(os.environ.get("MODE_GGUF_FUZZ_SEED", "0"))
ROWS, COLUMNS = 9, 4096
SUPER_BLOCKS = ROWS * COLUMNS // 256
"""144 to a draw: whole tiles and a part of one, for any number of lanes."""


def draw(seed: int, distribution: str, number: int) -> tuple[np.ndarray, str, np.ndarray]:
    """The draw `number` of a distribution: weights, the kind of importance, importance."""
    position = list(inputs.DISTRIBUTIONS).index(distribution)
    generator = np.random.default_rng([seed, position, number])
    kind = list(inputs.IMPORTANCES)[(position + number) % len(inputs.IMPORTANCES)]
    matrix = inputs.weights(distribution, generator, ROWS, COLUMNS)
    return matrix, kind, inputs.importance(kind, generator, COLUMNS)


def difference(packed: np.ndarray, expected: np.ndarray, type_name: str) -> str | None:
    """The first difference of two packed matrices, in words; None where they do not."""
    differs = np.flatnonzero(packed.ravel() != expected.ravel())
    if not differs.size:
        return None
    block_bytes = TYPES[type_name].block_bytes
    blocks = np.unique(differs // block_bytes)
    block, byte = divmod(int(differs[0]), block_bytes)
    found, wanted = packed.ravel()[differs[0]], expected.ravel()[differs[0]]
    return f"{blocks.size} blocks differ, block {block} first, from byte {byte} on: {found:#04x}, libggml {wanted:#04x}"


@pytest.mark.parametrize("distribution", inputs.DISTRIBUTIONS)
@pytest.mark.parametrize("super_blocks", [10_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_drawn_weights_pack_to_the_bytes_of_libggml(distribution: str, super_blocks: int) -> None:
    """At least `super_blocks` of all distributions together to every type, without and with importance."""
    of_distribution = super_blocks // len(inputs.DISTRIBUTIONS) + 1
    for number in range(-(-of_distribution // SUPER_BLOCKS)):
        matrix, kind, importance = draw(SEED, distribution, number)
        for type_name in TYPES:
            for name, weights in (("none", None), (kind, importance)):
                expected = ggml_oracle.quantize(matrix, type_name, weights)
                found = difference(pack(matrix, type_name, weights), expected, type_name)
                assert found is None, (
                    f"{type_name}, importance {name}: {found}; drawn by draw({SEED}, {distribution!r}, {number}) of "
                    f"tests/kernels/test_fuzz.py, run again with MODE_GGUF_FUZZ_SEED={SEED} and -k {distribution}"
                )


def test_a_difference_is_described() -> None:
    expected = np.zeros((2, 3 * 34), np.uint8)
    packed = expected.copy()
    assert difference(packed, expected, "Q8_0") is None
    packed[1, 34 + 5] = 17
    packed[1, 34 + 9] = 1
    message = "1 blocks differ, block 4 first, from byte 5 on: 0x11, libggml 0x00"
    assert difference(packed, expected, "Q8_0") == message
