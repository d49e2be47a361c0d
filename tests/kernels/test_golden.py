"""Kernels and libggml against the digests on file (see `golden`)."""

import numpy as np
import pytest

from mode_gguf_kernels import TYPES
from tests.kernels import ggml_oracle, golden
from tests.kernels.modes import MODES, MODES_AND_TYPES, Mode, mode_id


@pytest.mark.parametrize(("mode", "type_name"), MODES_AND_TYPES, ids=mode_id)
def test_kernels_give_the_digests_on_file(mode: Mode, type_name: str) -> None:
    assert golden.digests(mode, type_name) == golden.table()[mode.name][type_name]


def test_a_digest_is_on_file_for_each_mode_and_type() -> None:
    assert {name: set(types) for name, types in golden.table().items()} == {m.name: set(m.types) for m in MODES}


@pytest.mark.parametrize("type_name", TYPES)
def test_libggml_gives_the_digests_on_file(type_name: str) -> None:
    weighted = ggml_oracle.quantize(golden.matrix(), type_name, golden.importance())
    assert golden.table()["exact"][type_name] == {
        golden.PLAIN: golden.digest(ggml_oracle.quantize(golden.matrix(), type_name)),
        golden.WEIGHTED: golden.digest(weighted),
        golden.UNPACKED: golden.digest(ggml_oracle.dequantize(weighted, type_name, golden.COLUMNS)),
    }


def test_the_fixed_weights_are_as_described() -> None:
    sections = golden.matrix().reshape(7, -1)
    assert np.isfinite(sections).all()
    bell, heavy, sparse, ties, byte_ties, exponents, bits = sections.astype(np.float64)
    assert abs(bell.mean()) < 0.05 * bell.std() < 0.01
    assert np.abs(heavy).max() > 1000 * np.median(np.abs(heavy))
    assert 0.03 < np.count_nonzero(sparse) / sparse.size < 0.1
    assert set(np.unique(ties)) == {-1.5, -1, -0.5, 0, 0.5, 1, 1.5}
    assert set(byte_ties.reshape(-1, 32).max(axis=1)) == {127}  # so that Q8_0's step is 1
    assert np.count_nonzero(byte_ties % 1 == 0.5) > 1000
    for wide in (exponents, bits):
        magnitudes = np.abs(wide[wide != 0])
        assert magnitudes.max() / magnitudes.min() > 1e60
