"""The commands about our own build of llama.cpp: what they say, where it is missing, and what they start."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mode_gguf.llama_cpp.runtime.installed import RECORD, cache_folder
from mode_gguf.llama_cpp.runtime.pinned_release import PATCH, BuildVariant
from tests.e2e.conftest import Run
from tests.llama_cpp.stand_ins import write_header, write_program


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """Nothing but the header of a file with one type per expert."""
    return write_header(tmp_path / "grouped model.gguf", "qwen3vlmoe+expert_groups")


def pretend_build(patch: Path | None) -> Path:
    """A folder in the cache whose llama-bench prints its arguments."""
    variant = BuildVariant(patch)
    folder = cache_folder() / variant.name
    write_program(folder / "bin" / "llama-bench", 'printf "%s|" "$@"')
    record = {"llama_cpp": "b11434", "patch": variant.patch_digest, "backend": "cpu", "options": ["-DA=B"]}
    (folder / RECORD).write_text(json.dumps({**record, "compiler": "GNU 12", "built": "2026-11-25T10:00:00+00:00"}))
    return folder / "bin"


def test_path(run: Run) -> None:
    assert "no llama.cpp with the patch" in run("runtime", "path", code=4)
    assert "mode-gguf runtime build --stock" in run("runtime", "path", "--stock", code=4)
    patched, stock = pretend_build(PATCH), pretend_build(None)
    assert run("runtime", "path") == f"{patched}\n"
    assert run("runtime", "path", "--stock") == f"{stock}\n"


def test_what_is_there_is_not_built_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = pretend_build(PATCH)
    monkeypatch.setenv("PATH", "")  # nothing could be built
    assert run("runtime", "build") == f"{patched}\n"
    built = json.loads(run("runtime", "build", "--json"))
    assert built["bin"] == str(patched)
    assert built["options"] == ["-DA=B"]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "pip install cmake ninja" in run("runtime", "build", "--rebuild", code=4)


def test_build_from_a_folder_that_is_none(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cmake", "ninja", "c++"):
        write_program(tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = run("runtime", "build", "--source", tmp_path / "absent", code=4)
    assert "include/llama.h cannot be read" in error
    assert "git clone --depth 1 --branch b11434" in error


def test_doctor(run: Run) -> None:
    assert (
        json.loads(run("doctor", "--json"))["type per expert"] == "no runtime; build it with: mode-gguf runtime build"
    )
    patched = pretend_build(PATCH)
    assert f"expert groups (patch {BuildVariant().patch_digest}, cpu) in {patched}" in run("doctor")


def test_run(grouped: Path, run: Run) -> None:
    assert "has one type per expert" in run("run", grouped, code=4)
    assert "cannot be read" in run("run", grouped.with_name("absent.gguf"), code=4)
    program = pretend_build(PATCH) / "llama-bench"
    command = [sys.executable, "-m", "mode_gguf_cli", "run", str(grouped), "--tool", "llama-bench", "--", "-p", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"-m|{grouped}|-p|a b|"
    assert done.stderr.strip() == shlex.join([str(program), "-m", str(grouped), "-p", "a b"])


def test_validate_needs_the_build(grouped: Path, run: Run) -> None:
    assert "build it with: mode-gguf runtime build" in run("validate", grouped, code=4)
