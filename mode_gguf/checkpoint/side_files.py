"""Files beside the weights: JSON that comes from elsewhere, and the byte order marks that some editors put into it."""

import codecs
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mode_gguf.checkpoint.text_files import refuse_lfs_pointer
from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

_MAX_JSON_BYTES = 2**26
_MARKED = (".json", ".jinja", ".md")
_SIDE_FILES = (*_MARKED, ".txt", ".model", ".tiktoken")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; a byte order mark is passed over.

    Raises:
        InputError: the file is missing, is too large, is not UTF-8 JSON, or holds something other than an object.
    """
    check_regular(path, "JSON file")
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise InputError(f"{path}: {size:,} bytes of JSON found, {_MAX_JSON_BYTES:,} at most are read")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a complete Hugging Face checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    return value


@contextmanager
def unmarked(folder: Path) -> Iterator[Path]:
    """The folder for libraries that take no byte order mark: itself, or a copy of its side files without marks.

    The copy has the folder's name, and is there for as long as the context lasts.
    """
    if not folder.is_dir() or not any(_is_marked(path) for path in folder.iterdir() if path.suffix in _MARKED):
        yield folder
        return
    with TemporaryDirectory(prefix="mode-gguf-") as temporary:
        copy = Path(temporary) / folder.resolve().name
        copy.mkdir()
        for path in folder.iterdir():
            if path.suffix in _SIDE_FILES and path.is_file():
                shutil.copyfile(path, copy / path.name)
                if _is_marked(path):
                    (copy / path.name).write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        yield copy


def _is_marked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
