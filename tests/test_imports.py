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
    "conversion_facts",
    "errors",
    "fp8",
    "gguf_header",
    "locks",
    "packed_weights",
    "tiktoken_model",
    "pictures",
    "progress",
    "shards",
}
STAGE_MAY_IMPORT = {
    "allocation": FOUNDATION | {"memory", "quantization"},
    "architectures": FOUNDATION,
    "artifacts": FOUNDATION,
    "calibration": FOUNDATION,
    "checkpoint": FOUNDATION,
    "conversion_facts": {"artifacts"},
    "errors": set(),
    "fp8": set(),
    "export": FOUNDATION | {"quantization"},
    "gguf_header": {"errors", "shards"},
    "hub": FOUNDATION | {"allocation", "validation", "runtime"},
    "importance": FOUNDATION | {"quantization", "calibration"},
    "llama_cpp_library": set(),
    "locks": set(),
    "packed_weights": set(),
    "tiktoken_model": FOUNDATION,
    "memory": {"artifacts", "errors", "quantization"},
    "pictures": {"errors"},
    "progress": set(),
    "quantization": FOUNDATION | {"llama_cpp_library"},
    "report": FOUNDATION | {"quantization", "validation"},
    "rounding": FOUNDATION | {"quantization", "calibration", "importance"},
    "runtime": {"artifacts", "errors", "llama_cpp_library", "progress", "quantization"},
    "shards": {"errors"},
    "validation": FOUNDATION | {"llama_cpp_library", "memory", "quantization", "runtime"},
    "workfolder": FOUNDATION,
}
HEAVY_ONLY_IN = {
    "torch": {"calibration", "importance", "rounding", "checkpoint"},
    "transformers": {"calibration", "importance"},
    "numba": {"mode_gguf_kernels"},
    "llvmlite": {"mode_gguf_kernels"},
    "mode_gguf_kernels": {"quantization", "rounding", "mode_gguf_kernels"},
    "pulp": {"allocation"},
    "matplotlib": {"allocation"},
    "typer": {"mode_gguf_cli"},
    "rich": {"mode_gguf_cli"},
    "xllamacpp": {"validation"},
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
