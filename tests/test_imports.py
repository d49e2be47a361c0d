"""The import rules of ARCHITECTURE (README): who may import whom, and which heavy libraries live where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for root in ("mode_gguf", "cli/mode_gguf_cli", "kernels/mode_gguf_kernels")
    for path in (ROOT / root).rglob("*.py")
)
FOUNDATION = {
    "architectures",
    "artifacts",
    "checkpoint",
    "errors",
    "gguf",
    "image_files",
    "llama_cpp_library",
    "locks",
    "progress",
}
"""What every stage may build on."""
STAGE_MAY_IMPORT = {
    "allocation": FOUNDATION | {"gpu_memory", "quantization"},
    "architectures": FOUNDATION,
    "artifacts": {"errors"},
    "calibration": FOUNDATION | {"data", "forward"},
    "checkpoint": {"architectures", "artifacts", "errors"},
    "data": FOUNDATION,
    "errors": set(),
    "export": FOUNDATION | {"quantization"},
    "feedback": FOUNDATION | {"calibration", "data", "forward", "importance", "quantization"},
    "forward": FOUNDATION | {"data"},
    "gguf": {"errors"},
    "gpu_memory": {"artifacts", "errors", "quantization"},
    "hub": FOUNDATION | {"allocation", "llama_cpp", "validation"},
    "image_files": {"errors"},
    "importance": FOUNDATION | {"calibration", "data", "forward", "quantization"},
    "llama_cpp": FOUNDATION | {"gpu_memory", "quantization"},
    "llama_cpp_library": set(),
    "locks": set(),
    "progress": set(),
    "quantization": FOUNDATION,
    "report": FOUNDATION | {"quantization", "validation"},
    "validation": FOUNDATION | {"gpu_memory", "llama_cpp", "quantization"},
    "workfolder": FOUNDATION,
}
HEAVY_ONLY_IN = {
    "torch": {"calibration", "feedback", "forward", "importance", "checkpoint"},
    "transformers": {"forward", "importance"},
    "numba": {"mode_gguf_kernels"},
    "llvmlite": {"mode_gguf_kernels"},
    "mode_gguf_kernels": {"feedback", "quantization", "mode_gguf_kernels"},
    "pulp": {"allocation"},
    "typer": {"mode_gguf_cli"},
    "rich": {"mode_gguf_cli"},
    "xllamacpp": {"llama_cpp"},
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}"


def part_of(path: Path) -> str:
    """The stage a file of the library belongs to, or the name of its package outside the library."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "mode_gguf":
        return relative.parts[1]
    return relative.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path: Path) -> None:
    part = part_of(path)
    for name in imported(path):
        top, *rest = name.split(".")
        assert part in HEAVY_ONLY_IN.get(top, {part}), f"{part} imports {name}"
        if top == "mode_gguf_cli":
            assert part == "mode_gguf_cli"
        if top == "mode_gguf" and part == "mode_gguf_kernels":
            pytest.fail(f"kernels import {name}")
        if top == "mode_gguf" and rest and part in STAGE_MAY_IMPORT:
            assert rest[0] in STAGE_MAY_IMPORT[part] | {part}, f"{part} imports {name}"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, mode_gguf_cli.main;"
        "print(*sorted({'torch', 'transformers', 'numba', 'pulp', 'skimage', 'matplotlib'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
