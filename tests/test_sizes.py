"""Sizes in bytes as people write them, and as they are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.errors import UsageError
from mode_gguf.sizes import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30),
        ("12G", 12 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("800MB", 800 * 10**6),
        (" 7 KiB", 7 * 1024),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "twelve", "12 GiBi", "12XB", "nan", "inf", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@given(st.integers(1, 2**62) | st.integers(1, 2**30).map(lambda n: n << 20))
def test_what_is_shown_is_read_again(size: int) -> None:
    text = size_text(size)
    assert parse_size(text) == size or text.isdigit()  # digits beyond what a float holds are rounded
