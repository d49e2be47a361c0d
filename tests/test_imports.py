"""The import rules of docs/design/architecture.md: who may import whom, and which heavy libraries live where."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
    "chat_templates",
    "checkpoint",
    "errors",
    "file_digests",
    "gguf",
    "image_files",
    "llama_cpp_library",
    "locks",
    "options",
    "plain_text",
    "probes",
    "progress",
    "recipe",
    "sample_files",
    "regular_files",
    "sizes",
    "text_prefix",
    "temporary_folders",
    "vocabulary",
}
"""Packages and modules that every stage may import."""
STAGE_MAY_IMPORT = {
    "allocation": FOUNDATION | {"gpu_memory", "quantization"},
    "architectures": FOUNDATION | {"gpu_memory"},
    "artifacts": {"errors", "regular_files"},
    "calibration": FOUNDATION | {"data", "forward"},
    "chat_templates": {"checkpoint", "errors"},
    "checkpoint": {"architectures", "artifacts", "errors", "file_digests", "plain_text", "progress", "regular_files"},
    "data": FOUNDATION,
    "errors": set(),
    "export": FOUNDATION | {"quantization"},
    "file_digests": {"artifacts", "errors", "progress"},
    "feedback": FOUNDATION | {"calibration", "data", "forward", "importance", "quantization"},
    "forward": FOUNDATION | {"data"},
    "gguf": {"errors", "regular_files"},
    "gpu_memory": {"artifacts", "errors", "options", "quantization", "vocabulary"},
    "hub": FOUNDATION | {"allocation", "llama_cpp", "validation"},
    "image_files": {"errors", "regular_files"},
    "importance": FOUNDATION | {"calibration", "data", "forward", "quantization"},
    "llama_cpp": FOUNDATION | {"gpu_memory", "quantization"},
    "llama_cpp_library": set(),
    "locks": set(),
    "options": {"errors", "sizes", "vocabulary"},
    "probes": {"artifacts", "errors"},
    "recipe": {"artifacts", "errors", "options", "regular_files"},
    "regular_files": {"errors"},
    "sample_files": {"errors", "regular_files"},
    "sizes": {"errors"},
    "text_prefix": set(),
    "temporary_folders": {"locks"},
    "vocabulary": set(),
    "plain_text": set(),
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
    "httpx2": {"llama_cpp"},
    "xllamacpp": {"llama_cpp"},
    "matplotlib": set(),
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


MODULES = {
    ".".join((root.rpartition("/")[2], *path.relative_to(ROOT / root).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for root in ("mode_gguf", "cli/mode_gguf_cli", "kernels/mode_gguf_kernels")
    for path in (ROOT / root).rglob("*.py")
}
MOST_PARAMETERS = 8
KERNELS = "mode_gguf_kernels"
"""Compiled code, whose functions take arrays and sizes apart."""


def at_import(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Modules that running a module's body imports: not what functions import, nor what only type checkers see."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inside)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Try | ast.With):
            yield from at_import(node.body)


def test_no_module_imports_itself_through_others() -> None:
    needs = {
        name: {one for one in at_import(ast.parse(path.read_text(encoding="utf-8")).body) if one in MODULES} - {name}
        for name, path in MODULES.items()
    }
    while needs:
        free = {name for name, imported in needs.items() if not imported & needs.keys()}
        assert free, f"these import each other: {', '.join(sorted(needs))}"
        needs = {name: imported for name, imported in needs.items() if name not in free}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_few_parameters(path: Path) -> None:
    if part_of(path) == KERNELS:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            assert count <= MOST_PARAMETERS, f"{node.name} has {count} parameters: make some of them one object"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, mode_gguf_cli.main;"
        "print(*sorted({'torch', 'transformers', 'numba', 'pulp', 'skimage', 'matplotlib'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
