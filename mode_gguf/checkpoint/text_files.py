"""Small text files of a checkpoint: Git LFS pointers in their places are named."""

from pathlib import Path

from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 2**24


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer in a file's place.

    Raises:
        InputError: it is one.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_POINTER))
    except OSError:
        return
    if beginning == _POINTER:
        raise InputError(
            f"{path}: a Git LFS pointer found instead of the file; fetch the files with `git lfs pull` in the "
            "repository, or download the model from the hub"
        )


def read_text_file(path: Path) -> str:
    """The text of a file such as a chat template, without a byte order mark.

    Raises:
        InputError: it cannot be read, is no file, is too large, is not UTF-8, or is a Git LFS pointer.
    """
    check_regular(path, "text file")
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise InputError(f"{path}: {size:,} bytes found, {_MAX_BYTES:,} of text at most are read")
        refuse_lfs_pointer(path)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); download it again") from error
