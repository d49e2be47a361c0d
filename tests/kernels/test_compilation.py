"""Compilation of kernels: time, cache folder, and staleness."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

import mode_gguf_kernels
from mode_gguf_kernels.compilation import cache_folder, sources_digest
from tests.kernels.processes import run

PACKAGE = Path(mode_gguf_kernels.__file__).parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's sources."""
    copy = tmp_path / "package"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_an_equal_copy_of_the_sources_has_the_same_digest(package: Path) -> None:
    assert sources_digest(package) == sources_digest()


@pytest.mark.parametrize("source", sorted(path.name for path in PACKAGE.glob("*.py")))
def test_an_edit_of_any_source_changes_the_digest(package: Path, source: str) -> None:
    path = package / source
    path.write_text(path.read_text() + "\n")
    assert sources_digest(package) != sources_digest()


def test_a_new_source_changes_the_digest(package: Path) -> None:
    (package / "another.py").touch()
    assert sources_digest(package) != sources_digest()


def test_the_first_folder_that_can_be_written_to_holds_the_cache(tmp_path: Path) -> None:
    unusable = tmp_path / "a file"
    unusable.touch()
    folder = cache_folder([unusable, tmp_path / "user", tmp_path / "last"], "0123")
    assert folder == tmp_path / "user" / "mode_gguf_kernels-0123"
    assert folder.is_dir()
    assert not (tmp_path / "last").exists()


def test_kernels_go_uncached_where_nothing_can_be_written_to(tmp_path: Path) -> None:
    unusable = tmp_path / "a file"
    unusable.touch()
    assert cache_folder([unusable], "0123") is None


THREADS_COMPILE = """
import threading
import numba
import numpy as np
from mode_gguf_kernels import TYPES, pack
from mode_gguf_kernels.compilation import sources_digest

chosen = numba.config.CACHE_DIR
assert not any(kernels.pack.signatures or kernels.unpack.signatures for kernels in TYPES.values())
matrix = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
start = threading.Barrier(4)
results = []

def work():
    start.wait()
    results.append(pack(matrix, "Q8_0").tobytes())

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(results) == 4
assert len(set(results)) == 1
assert numba.config.CACHE_DIR == chosen
print(sources_digest(), sum(TYPES["Q8_0"].pack.stats.cache_misses.values()))
"""


def test_threads_may_share_the_first_call_and_later_processes_what_it_compiled(tmp_path: Path) -> None:
    digest, compiled = run(THREADS_COMPILE, tmp_path).split()
    assert compiled == "1"
    cached = {path.name.split("-")[0] for path in (tmp_path / f"mode_gguf_kernels-{digest}").rglob("*.nbc")}
    assert cached == {"matrix.Q8_0.pack"}
    assert run(THREADS_COMPILE, tmp_path).split() == [digest, "0"]


UNPACK = """
import json
import numpy as np
from mode_gguf_kernels import TYPES, unpack

packed = np.arange(4 * 32, dtype=np.uint8).reshape(4, 32)
found = {{}}
for name in {types}:
    row = np.tile(packed, 9)[:, : 9 * TYPES[name].block_bytes]
    weights = unpack(row, name, 9 * 32)
    found[name] = sum(TYPES[name].unpack.stats.cache_misses.values()), row.tolist(), weights.view(np.uint32).tolist()
print(json.dumps(found))
"""


def test_kernels_of_one_template_are_told_apart_in_the_cache(tmp_path: Path) -> None:
    """Each compiled by a process of its own, where Numba's counters, which are in its symbols, begin anew."""
    for name in ("Q4_0", "Q5_0"):
        assert json.loads(run(UNPACK.format(types=(name,)), tmp_path))[name][0] == 1
    for name, (compiled, row, bits) in json.loads(run(UNPACK.format(types=("Q5_0", "Q4_0")), tmp_path)).items():
        assert compiled == 0
        expected = dequantize(np.array(row, np.uint8), gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(np.array(bits, np.uint32), expected.view(np.uint32))
