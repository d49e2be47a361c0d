"""Pictures that are damaged, or say that they are huge."""

import io
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mode_gguf.errors import InputError
from mode_gguf.image_files import open_image_file
from mode_gguf.sample_files import read_rows
from tests.refusals import refused_at_once


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(32 * 24 * 3, dtype=np.uint8).reshape(24, 32, 3)).save(file, kind)
    return file.getvalue()


FILES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


def claiming(width: int, height: int) -> bytes:
    """A small PNG file of that size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return FILES["PNG"][:12] + head + struct.pack(">I", zlib.crc32(head)) + FILES["PNG"][33:]


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (12_000, 12_000), (2**31 - 1, 1)])
def test_claims_of_size_are_refused_before_decoding(width: int, height: int) -> None:
    refused_at_once(partial(open_image_file, claiming(width, height), "bomb.png"), r"^bomb\.png: ")


@pytest.mark.parametrize("kind", FILES)
def test_whole_and_truncated(kind: str) -> None:
    assert open_image_file(FILES[kind], "picture").size == (32, 24)
    with pytest.raises(InputError, match=r"^picture: cannot be read"):
        open_image_file(FILES[kind][:20], "picture")


def test_what_needs_other_programs_is_refused() -> None:
    with pytest.raises(InputError, match="PNG"):
        open_image_file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "picture.eps")


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(FILES)), data=st.data())
def test_any_damage_is_refused_or_harmless(kind: str, data: st.DataObject) -> None:
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image_file(bytes(content), "picture").mode == "RGB"
    except InputError as error:
        assert str(error).startswith("picture: ")  # noqa: PT017


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b"\xff", b"{", rb'{"a": "\ud800"}'])
def test_hostile_lines(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(line)
    with pytest.raises(InputError, match=r"samples\.jsonl"):
        list(read_rows(path))


def test_gigabytes_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(InputError, match=r"samples\.jsonl: 8,589,934,592 bytes"):
        list(read_rows(path))
