"""The same bytes from every code path: baseline x86-64, AVX2, AVX-512, each compiled anew in its own process."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding
import pytest

from mode_gguf_kernels import TYPES
from tests.kernels import golden
from tests.kernels.modes import MODES
from tests.kernels.processes import run

QUICK_AND_ALL_TYPES = pytest.mark.parametrize(
    "types", [("Q8_0", "Q6_K"), pytest.param(tuple(TYPES), marks=pytest.mark.long)], ids=("quick", "all")
)
"""The two that compile fastest; all others are left to the long test."""


@dataclass(frozen=True, slots=True)
class Target:
    """A processor to compile for.

    Attributes:
        environment: what tells Numba so.
        needs: the feature the host must have to run it; None for what every x86-64 has.
        registers: the widest vector registers the compiled code uses.
        lanes: what `simd.LANES` must be.
    """

    environment: Mapping[str, str]
    needs: str | None
    registers: str
    lanes: int


TARGETS = {
    "x86-64": Target({"NUMBA_CPU_NAME": "generic"}, None, "xmm", 16),
    "AVX2": Target({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}, "avx2", "ymm", 16),
    "AVX-512": Target({}, "avx512f", "zmm", 32),
}

DIGESTS = """
import json
from mode_gguf_kernels import TYPES
from mode_gguf_kernels.simd import LANES
from tests.kernels.golden import digests
from tests.kernels.modes import MODES

found = {{mode.name: {{name: digests(mode, name) for name in mode.types if name in {types}}} for mode in MODES}}
code = "".join(TYPES["Q8_0"].pack.inspect_asm().values())
registers = max((name for name in ("xmm", "ymm", "zmm") if name in code))
print(json.dumps({{"lanes": LANES, "registers": registers, "digests": found}}))
"""


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@QUICK_AND_ALL_TYPES
def test_bytes_are_the_same_on_every_processor(target: Target, types: tuple[str, ...], tmp_path: Path) -> None:
    """Compile `types` for the target and compare what they pack with the digests on file."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this is not an x86-64 processor")
    if target.needs and not llvmlite.binding.get_host_cpu_features().get(target.needs):
        pytest.skip(f"this processor has no {target.needs}")
    found = json.loads(run(DIGESTS.format(types=types), tmp_path, **target.environment))
    assert found["lanes"] == target.lanes
    assert found["registers"] == target.registers
    stored = golden.table()
    assert found["digests"] == {
        mode.name: {name: stored[mode.name][name] for name in mode.types if name in types} for mode in MODES
    }
