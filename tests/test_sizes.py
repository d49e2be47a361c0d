"""Sizes in bytes as people write them, and as they are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.errors import UsageError
from mode_gguf.sizes import binary_size, decimal_size, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30),
        ("12G", 12 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("800MB", 800 * 10**6),
        (" 7 KiB", 7 * 1024),
        ("1.5TB", 15 * 10**11),
        ("2T", 2 * 2**40),
        ("12gb", 12 * 10**9),
        ("24Gi", 24 * 2**30),
        ("8", 8),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "twelve", "12 GiBi", "12XB", "8,5GB", "1PB", "nan", "inf", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size: .*GB \(10\^9 bytes\), GiB or G \(2\^30\)"):
        parse_size(text)


@given(st.integers(1, 2**62) | st.integers(1, 2**30).map(lambda n: n << 20))
def test_what_is_shown_is_read_again(size: int) -> None:
    text = size_text(size)
    assert parse_size(text) == size or text.isdigit()  # digits beyond what a float holds are rounded


def test_small_sizes_are_shown_in_small_units() -> None:
    sizes = (0, 81_000, 6_700_000, 99_000_000, 12_340_000_000, 1_500_000_000_000)
    assert [decimal_size(size) for size in sizes] == ["0 kB", "81 kB", "6.7 MB", "99.0 MB", "12.3 GB", "1.5 TB"]
    assert [binary_size(1 << power) for power in (9, 15, 25, 31, 41)] == [
        *("0 KiB", "32 KiB", "32.0 MiB", "2.0 GiB", "2.0 TiB")
    ]
    assert decimal_size(12_340_000_000, 2) == "12.34 GB"
