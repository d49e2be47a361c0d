"""Kernels compiled with a check of every access, those of their own SIMD operations too, and matrices of odd shapes."""

from pathlib import Path

from tests.kernels.processes import run
from tests.kernels.test_targets import QUICK_AND_ALL_TYPES

SHAPES = """
import numpy as np
from mode_gguf_kernels import unpack
from mode_gguf_kernels.simd import LANES
from tests.kernels.modes import MODES_AND_TYPES

generator = np.random.default_rng(0)
for mode, type_name in MODES_AND_TYPES:
    if type_name not in {types}:
        continue
    for rows, blocks in ((1, 1), (1, 3), (3, 5), (LANES - 1, 1), (LANES, 1), (LANES + 1, 2), (7, 19)):
        matrix = generator.standard_normal((rows, 256 * blocks)).astype(np.float32)
        bits = (matrix.view(np.uint32) >> 16).astype(np.uint16)
        importance = generator.standard_normal(256 * blocks).astype(np.float32) ** 2
        for weights in (None, importance):
            for source in (matrix, matrix.astype(np.float16), bits):
                packed = mode.pack(source, type_name, weights)
                error = unpack(packed, type_name, 256 * blocks) - matrix
                assert np.sqrt(np.mean(error**2)) < 0.5
    print(type_name)
"""


@QUICK_AND_ALL_TYPES
def test_no_shape_makes_an_access_out_of_range(types: tuple[str, ...], tmp_path: Path) -> None:
    printed = run(SHAPES.format(types=types), tmp_path, NUMBA_BOUNDSCHECK="1").split()
    assert set(printed) == set(types)


def test_an_access_out_of_range_is_caught(tmp_path: Path) -> None:
    script = "from tests.kernels.bounds import main; main()"
    assert run(script, tmp_path, NUMBA_BOUNDSCHECK="1").split() == ["load", "store", "gather", "scatter", "copy_bytes"]


def test_checked_kernels_have_a_cache_of_their_own(tmp_path: Path) -> None:
    script = "from mode_gguf_kernels.compilation import sources_digest; print(sources_digest())"
    checked, also_checked, usual = (run(script, tmp_path, NUMBA_BOUNDSCHECK=value) for value in ("1", "2", "0"))
    assert checked == also_checked != usual
