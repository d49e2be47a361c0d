"""Git LFS pointers in the places of files, through the public command."""

from tests.e2e.conftest import Run, ended, run  # noqa: F401

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11422654\n"
