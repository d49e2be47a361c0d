"""Pictures: as llama.cpp shows them to a model, damaged ones, and those that say that they are huge."""

import io
import os
import struct
import zlib
from ctypes import c_bool, c_char_p, c_size_t, c_void_p, string_at
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from mode_gguf.errors import InputError
from mode_gguf.image_files import file_for_llama_cpp, open_image_file
from mode_gguf.llama_cpp import c_api
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


def sixteen_bit_colours() -> bytes:
    """A PNG file with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = np.random.default_rng(1).integers(0, 1 << 16, (24, 32 * 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8), "RGBA")
PLAIN, FEW = COLOURS.convert("RGB"), COLOURS.convert("RGB").quantize(16)
SIXTEEN_BITS = Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (24, 32), dtype=np.uint16))
AS_LLAMA_CPP: dict[str, tuple[Image.Image | bytes, str, dict[str, Any], int]] = {
    "colours": (PLAIN, "PNG", {}, 0),
    "16 bits of grey": (SIXTEEN_BITS, "PNG", {}, 0),
    "16 bits of colour": (sixteen_bit_colours(), "PNG", {}, 0),
    "transparency": (COLOURS, "PNG", {}, 0),
    "transparent grey": (COLOURS.convert("LA"), "PNG", {}, 0),
    "transparent palette": (FEW, "PNG", {"transparency": bytes(range(16))}, 0),
    "transparent colour": (PLAIN, "PNG", {"transparency": PLAIN.getpixel((0, 0))}, 0),
    "transparent entry": (FEW, "PNG", {"transparency": 3}, 0),
    "one bit": (PLAIN.convert("1"), "PNG", {}, 0),
    "turned": (PLAIN, "PNG", {"exif": turned()}, 0),
    "turned JPEG": (PLAIN, "JPEG", {"exif": turned()}, 4),
    "CMYK": (PLAIN.convert("CMYK"), "JPEG", {}, 2),
    "GIF": (FEW, "GIF", {}, 0),
    "transparent GIF": (FEW, "GIF", {"transparency": 3}, 0),
    "transparent GIF with a background": (FEW, "GIF", {"transparency": 3, "background": 5}, 0),
    "animation": (FEW, "GIF", {"save_all": True, "append_images": [FEW.rotate(180)]}, 0),
    "BMP": (COLOURS, "BMP", {}, 0),
    "PPM": (PLAIN, "PPM", {}, 0),
}
"""Pictures, their formats and Pillow's options; how far two JPEG decoders may be apart."""


def shown_by_llama_cpp(content: bytes) -> np.ndarray:
    """Pixels of a file as llama.cpp's own reader decodes it."""
    library = c_api.library()
    reader = library.mtmd_helper_bitmap_init_from_buf
    reader.restype, reader.argtypes = c_void_p, (c_void_p, c_char_p, c_size_t, c_bool)
    size: dict[str, Any] = {}
    for name in ("nx", "ny", "n_bytes"):
        function = getattr(library, f"mtmd_bitmap_get_{name}")
        function.restype, function.argtypes = c_size_t, (c_void_p,)
        size[name] = function
    library.mtmd_bitmap_get_data.restype, library.mtmd_bitmap_get_data.argtypes = c_void_p, (c_void_p,)
    bitmap = reader(None, content, len(content), False)
    assert bitmap
    pixels = string_at(library.mtmd_bitmap_get_data(bitmap), size["n_bytes"](bitmap))
    shape = (size["ny"](bitmap) & 0xFFFFFFFF, size["nx"](bitmap) & 0xFFFFFFFF, 3)
    library.mtmd_bitmap_free(bitmap)
    return np.frombuffer(pixels, np.uint8).reshape(shape)


@pytest.mark.parametrize("name", AS_LLAMA_CPP)
def test_pixels_are_those_that_llama_cpp_shows_the_model(name: str) -> None:
    picture, kind, options, tolerance = AS_LLAMA_CPP[name]
    if isinstance(picture, bytes):
        content = picture
    else:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        content = file.getvalue()
    ours, theirs = np.asarray(open_image_file(content, name)), shown_by_llama_cpp(content)
    assert ours.shape == theirs.shape == (24, 32, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= tolerance


RAMP = np.linspace(0, 1, 32 * 24, dtype=np.float32).reshape(24, 32)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP, "TIFF"),
        (RAMP * 255, "TIFF"),
        (RAMP * 65535, "TIFF"),
        ((RAMP * 255).round().astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "PPM"),
    ],
)
def test_a_ramp_stays_a_ramp(values: np.ndarray, kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    for source in (file.getvalue(), Image.fromarray(values)):
        shown = np.asarray(open_image_file(source, "ramp"))
        assert np.abs(shown - 255 * RAMP[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    "values",
    [RAMP - 1, RAMP * 1e6, np.full((4, 4), np.nan, np.float32), np.full((4, 4), -5)],
)
def test_numbers_without_a_known_range_are_refused(values: np.ndarray) -> None:
    source = Image.fromarray(values.astype(np.float32 if values.dtype.kind == "f" else np.int32))
    with pytest.raises(InputError, match=r"^picture: its values go from .* save it with 8 bits"):
        open_image_file(source, "picture")


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (0, 5)])
def test_shapes_that_no_model_takes(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"^picture: {size[0]} x {size[1]} pixels"):
        open_image_file(Image.new("RGB", size), "picture")


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "HSV", "PA", "La", "RGBa", "RGBX"])
def test_decoded_pictures_of_any_mode(mode: str) -> None:
    try:
        assert open_image_file(Image.new(mode, (8, 6)), "picture").mode == "RGB"
    except InputError as error:
        assert str(error).startswith("picture: cannot be read as an image")  # noqa: PT017


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match=r"is no regular file"):
            open_image_file(path, str(path))


@pytest.mark.parametrize("kind", FILES)
def test_files_that_llama_cpp_reads_are_given_to_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(FILES[kind])
    (tmp_path / "made").mkdir()
    given = file_for_llama_cpp(path, tmp_path / "made")
    assert (given == path) == (kind in ("PNG", "JPEG", "GIF", "BMP"))
    shown = shown_by_llama_cpp(given.read_bytes()).astype(int)
    assert np.abs(shown - np.asarray(open_image_file(path, kind))).max() <= 4
