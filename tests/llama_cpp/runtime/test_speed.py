"""The drawn model that speed is measured on, and the measurement in the real build."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from mode_gguf.errors import MissingResourceError
from mode_gguf.llama_cpp.runtime.installed import Runtime
from mode_gguf.llama_cpp.runtime.random_model import random_groups, write_random_model
from mode_gguf.llama_cpp.runtime.speed import GROUPS, SHAPE, bench, check_runs
from tests.llama_cpp.builds import PATCHED, named_build
from tests.llama_cpp.stand_ins import BUILT, write_program


@pytest.mark.parametrize("types", [GROUPS, GROUPS[1:2]])
def test_drawn_model(tmp_path: Path, types: tuple[str, ...]) -> None:
    counts = [SHAPE.experts] if len(types) == 1 else [20, 5, 7]
    write_random_model(tmp_path / "drawn.gguf", SHAPE, types, random_groups(SHAPE, counts))
    reader = GGUFReader(tmp_path / "drawn.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in range(SHAPE.layers):
        names = [f"blk.{layer}.ffn_down_exps{f'.{g}' * (g > 0)}.weight" for g in range(len(types))]
        assert [tensors[name].tensor_type.name for name in names] == list(types)
        assert [len(tensors[name].data) for name in names] == counts
        for name in names:
            weights = dequantize(tensors[name].data, tensors[name].tensor_type)
            assert weights.shape[1:] == (SHAPE.hidden, SHAPE.width)
            assert 1e-5 < np.abs(weights).max() < 0.1
        if len(types) == 1:
            assert f"blk.{layer}.ffn_exps_map.weight" not in tensors
            continue
        numbers = tensors[f"blk.{layer}.ffn_exps_map.weight"].data
        assert ((numbers >= 0).sum(axis=0) == 1).all()
        assert [sorted(row[row >= 0]) for row in numbers] == [list(range(len(tensors[name].data))) for name in names]


def test_no_usable_program(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match=r"llama-bench cannot measure: .*runtime build --rebuild"):
        bench(Runtime(tmp_path, BUILT))
    write_program(tmp_path / "bin" / "llama-bench", "echo no device >&2; exit 3")
    with pytest.raises(MissingResourceError, match=r"llama-bench cannot measure: exit code 3: no device; .* --rebuild"):
        bench(Runtime(tmp_path, BUILT))


@pytest.mark.parametrize("amx", [False, True])
def test_a_build_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    write_program(tmp_path / "bin" / "llama-bench", "kill -SEGV $$")
    monkeypatch.setattr("mode_gguf.llama_cpp.runtime.speed._has_amx", lambda: amx)
    way = "CXXFLAGS=-U__AMX_INT8__ " if amx else ""
    with pytest.raises(MissingResourceError, match=rf"exit code -11: ; build it again with: {way}mode-gguf runtime"):
        check_runs(Runtime(tmp_path, BUILT))


@pytest.mark.runtime
def test_bench() -> None:
    runtime = Runtime(named_build(PATCHED).parent, BUILT)
    check_runs(runtime)
    speeds = bench(runtime)
    assert list(speeds) == ["one type", "skip", "mask"]
    assert all(speed.prompt > speed.generation > 0 for speed in speeds.values())
