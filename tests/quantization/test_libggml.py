"""libggml as a packer: found where it should be, refused with a way out, and never able to end the process."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from mode_gguf.architectures.tensors import ALL_ROWS, Role, SourceTensor
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.llama_cpp_library import ENVIRONMENT_VARIABLE, embedded_library
from mode_gguf.options import Packing
from mode_gguf.quantization import libggml
from mode_gguf.quantization.packer import pack_matrix, unpack_matrix
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, Packer, QuantType, parse_types, types_packed_by
from tests.kernels import ggml_oracle

TYPES = types_packed_by(Packer.LIBGGML)
NEED_IMPORTANCE = {"IQ2_XXS", "IQ2_XS"}
ROWS, COLUMNS = 6, 512

EXTREMES = """
import sys

import numpy as np

from mode_gguf.errors import InputError
from mode_gguf.quantization.packer import pack_matrix, unpack_matrix
from mode_gguf.quantization.types import Packer, types_packed_by

random = np.random.default_rng(0)


def magnitudes(shape, lowest, highest, share_of_zeros):
    exponents = random.uniform(lowest, highest, random.choice([1, shape[-1] // 16, shape[-1]]))
    values = 10.0 ** np.resize(exponents, shape) * np.abs(random.standard_normal(shape))
    values[random.random(shape) < share_of_zeros] = 0
    return np.minimum(values, 3e38).astype(np.float32)


packed = refused = 0
for quant_type in types_packed_by(Packer.LIBGGML).values():
    for highest_weight in (0, 6, 9, 38):
        for highest_importance in (0, 20, 38):
            for zeros in (0.0, 0.5, 0.99, 1.0):
                matrix = magnitudes((2, 512), random.choice([-45, -8]), highest_weight, random.choice([0, 0.9]))
                matrix *= random.choice(np.array([-1, 1], np.float32), matrix.shape)
                importance = magnitudes((512,), random.choice([-45, -8]), highest_importance, zeros)
                try:
                    rows = pack_matrix(matrix, quant_type, importance, name="m")
                except InputError:
                    refused += 1
                else:
                    packed += 1
                    assert np.isfinite(unpack_matrix(rows, quant_type, 512)).all(), quant_type.name
assert packed > refused > 0
"""


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for again in this test, and after it."""
    libggml.library.cache_clear()
    yield
    libggml.library.cache_clear()


@pytest.fixture
def no_embedded_library(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "embedded_library", lambda: None)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def normal(seed: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(width: int, activation: str | None) -> SourceTensor:
    return SourceTensor("m", (4, width), Role.DENSE, ("m",), lambda _, rows=ALL_ROWS: normal(0)[rows], activation)


@pytest.mark.parametrize("quant_type", QUANT_TYPES.values(), ids=QUANT_TYPES)
def test_blocks_are_those_of_gguf(quant_type: QuantType) -> None:
    assert gguf.GGML_QUANT_SIZES[quant_type.ggml_type] == (quant_type.block_size, quant_type.type_size)


class TestFinding:
    def test_the_embedded_library_goes_before_the_users(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "libggml-base.so").touch()
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
        assert libggml.library_path() == embedded_library()

    @pytest.mark.usefixtures("no_embedded_library")
    @pytest.mark.parametrize(
        "place", ["libggml-base.so", "bin/ggml-base.dll", "build/bin/libggml-base.dylib", "lib/libggml-base.so"]
    )
    def test_the_users_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
        assert libggml.library_path() == path

    @pytest.mark.usefixtures("no_embedded_library")
    def test_without_any_only_its_types_are_refused(self) -> None:
        libggml.check_available(parse_types("Q2_K,Q8_0,Q4_0,IQ4_NL,F16"))
        with pytest.raises(MissingResourceError, match=r"IQ2_XXS.*pip install xllamacpp, or let MODE_GGUF_LLAMA_CPP"):
            libggml.check_available(parse_types("Q2_K,IQ4_XS"))
        assert "was not found" in libggml.status()

    @pytest.mark.usefixtures("no_embedded_library")
    def test_a_file_that_is_no_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "libggml-base.so").touch()
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
        with pytest.raises(MissingResourceError, match=r"libggml-base\.so cannot be loaded"):
            libggml.library()

    @pytest.mark.usefixtures("fresh")
    def test_a_library_without_our_functions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(libggml._FUNCTIONS, "ggml_of_tomorrow", (None, ()))
        with pytest.raises(MissingResourceError, match="does not export ggml_of_tomorrow"):
            libggml.library()

    @pytest.mark.usefixtures("fresh")
    def test_a_library_that_lays_a_type_out_differently(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(libggml._TYPES, "IQ4_XS", replace(QUANT_TYPES["IQ4_XS"], type_size=20))
        with pytest.raises(MissingResourceError, match=r"type 23 is .*, IQ4_XS with 256 weights in 20 bytes expected"):
            libggml.library()

    @pytest.mark.usefixtures("fresh")
    def test_a_build_of_llama_cpp_packs_the_same_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libggml, "embedded_library", lambda: None)
        try:
            libggml.library()
        except MissingResourceError:
            pytest.skip("no libggml-base in or near the folder MODE_GGUF_LLAMA_CPP")
        for name, quant_type in TYPES.items():
            importance = normal(2, (COLUMNS,)) ** 2
            packed = pack_matrix(normal(1), quant_type, importance, name="m")
            np.testing.assert_array_equal(packed, ggml_oracle.quantize(normal(1), name, importance), err_msg=name)


class TestImportance:
    def test_who_needs_it(self) -> None:
        assert {name for name, quant_type in QUANT_TYPES.items() if libggml.needs_importance(quant_type)} == (
            NEED_IMPORTANCE
        )

    @pytest.mark.parametrize("name", TYPES)
    def test_without(self, name: str) -> None:
        if name in NEED_IMPORTANCE:
            with pytest.raises(InputError, match=f"^m: {name} needs an importance matrix.*`mode-gguf calibrate`"):
                pack_matrix(normal(1), TYPES[name], None, name="m")
        else:
            packed = pack_matrix(normal(1), TYPES[name], None, name="m")
            np.testing.assert_array_equal(packed, ggml_oracle.quantize(normal(1), name))

    def test_a_tensor_without_activations_cannot_have_a_type_that_needs_it(self) -> None:
        assert not libggml.is_storable(tensor(256, None), TYPES["IQ2_XXS"])
        assert libggml.is_storable(tensor(256, "m"), TYPES["IQ2_XXS"])
        assert libggml.is_storable(tensor(256, None), TYPES["IQ2_S"])
        assert not libggml.is_storable(tensor(96, "m"), TYPES["IQ2_S"])

    @pytest.mark.parametrize("name", TYPES)
    @pytest.mark.parametrize("zeros", [slice(0, 32), slice(0, 256), slice(None)])
    def test_columns_of_no_importance_pack_as_in_libggml(self, name: str, zeros: slice) -> None:
        importance = normal(2, (COLUMNS,)) ** 2
        importance[zeros] = 0
        packed = pack_matrix(normal(1), TYPES[name], importance, name="m")
        np.testing.assert_array_equal(packed, ggml_oracle.quantize(normal(1), name, importance))
        assert np.isfinite(unpack_matrix(packed, TYPES[name], COLUMNS)).all()

    @pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
    def test_unusable_values(self, value: float) -> None:
        importance = np.ones(COLUMNS, np.float32)
        importance[7] = value
        with pytest.raises(InputError, match=f"^m: importance of column 7: {value} found, a finite value of at least"):
            pack_matrix(normal(1), TYPES["IQ2_S"], importance, name="m")

    def test_shape_and_size(self) -> None:
        with pytest.raises(InputError, match=r"importance is float32 \(5,\), float32 \(512,\) expected"):
            pack_matrix(normal(1), TYPES["IQ2_S"], np.ones(5, np.float32), name="m")
        with pytest.raises(InputError, match=r"importance up to 1e\+37 .* overflows when packed to IQ3_S; scale"):
            pack_matrix(normal(1), TYPES["IQ3_S"], np.full(COLUMNS, 1e37, np.float32), name="m")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [-9e8, 1e20, np.inf])
def test_values_too_large_are_refused_by_name(name: str, value: float) -> None:
    matrix = normal(1)
    matrix[4, 300] = value
    with pytest.raises(InputError, match=f"^m: .* in row 4, column 300 cannot be stored as {name}; "):
        pack_matrix(matrix, TYPES[name], np.ones(COLUMNS, np.float32), name="m")


def test_no_weights_and_importance_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", EXTREMES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", TYPES)
def test_refined_packing_keeps_the_size_of_outputs(name: str) -> None:
    """<q, x> = <x, x> per row, but for the rounding of a scale; libggml alone is farther from it."""
    random = np.random.default_rng(5)
    matrix = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    importance = (random.random(COLUMNS) + 0.1).astype(np.float32)

    def gains(packing: Packing) -> np.ndarray:
        packed = pack_matrix(matrix, QUANT_TYPES[name], importance, name="m", packing=packing)
        unpacked = unpack_matrix(packed, QUANT_TYPES[name], COLUMNS)
        gain: np.ndarray = (importance * matrix * unpacked).sum(axis=1) / (importance * matrix**2).sum(axis=1)
        return gain

    np.testing.assert_allclose(gains(Packing("refined")), 1, atol=2e-3)
    assert abs(gains(EXACT).mean() - 1) > abs(gains(Packing("refined")).mean() - 1)
