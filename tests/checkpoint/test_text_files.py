"""Git LFS pointers in the places of files, through the public command."""

import shutil
from pathlib import Path

import pytest

from mode_gguf.checkpoint.text_files import read_text_file
from mode_gguf.errors import InputError
from tests.e2e.conftest import Run, run, ended  # noqa: F401

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11422654\n"
