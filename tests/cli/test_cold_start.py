"""Asking for help neither loads nor compiles kernels."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from mode_gguf_cli.main import app

try:
    app({arguments})
except SystemExit as ended:
    assert ended.code == 0
loaded = {{"llvmlite", "mode_gguf_kernels", "numba", "torch", "transformers"}} & set(sys.modules)
print(*sorted(loaded), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"]])
def test_help_is_given_without_numba(arguments: list[str]) -> None:
    script = SCRIPT.format(arguments=arguments)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    assert result.stderr.split() == []
