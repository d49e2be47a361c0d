"""Programs, files and builds that are nothing but what a test looks at."""

from pathlib import Path

from gguf import GGUFWriter

from mode_gguf.llama_cpp.runtime.installed import BuildRecord

BUILT = BuildRecord(llama_cpp="b11434", patch="0123456789ab", backend="cpu", options=(), compiler="GNU", built="now")


def write_program(path: Path, script: str = "") -> Path:
    """A shell script that can be executed, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def write_header(path: Path, architecture: str) -> Path:
    """A GGUF file with nothing but its architecture."""
    writer = GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
