"""Sizes in bytes as people write them, and as they are shown.

Files and disks are shown in decimal units (1 GB = 10^9 bytes), as download pages and `df -H` show them; memory in
binary ones (1 GiB = 2^30 bytes), as drivers and llama.cpp count it. Read are both, and the letters K, M, G and T alone
as binary, as llama.cpp and `ls -h` mean them.
"""

from mode_gguf.errors import UsageError

_PREFIXES = "KMGT"
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate(_PREFIXES, start=1)
    for suffix, base in (("", 1024), ("IB", 1024), ("I", 1024), ("B", 1000))
}
EXPECTED = "a number with GB (10^9 bytes), GiB or G (2^30), or likewise K, M or T expected, such as 12GiB"
"""What a size looks like, for messages."""


def decimal_size(size: float, digits: int = 1) -> str:
    """A size in words, with `digits` after the point: 12.3 GB, 6.7 MB, and 81 kB without any."""
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= divisor:
            return f"{size / divisor:,.{digits}f} {unit}"
    return f"{size / 1e3:,.0f} kB"


def binary_size(size: float, digits: int = 1) -> str:
    """A size of memory in words, likewise: 12.3 GiB, 6.7 MiB, and 81 KiB without any."""
    for unit, divisor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= divisor:
            return f"{size / divisor:,.{digits}f} {unit}"
    return f"{size / 1024:,.0f} KiB"


def size_text(size: int) -> str:
    """A size in words that `parse_size` reads as just as many bytes: 4GiB."""
    for unit, divisor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size % divisor == 0 and size:
            return f"{size // divisor}{unit}"
    return str(size)


def parse_size(text: str) -> int:
    """Bytes of `12GiB`, `800MB`, `6G` (binary) or a plain number of bytes, in any letter case.

    Raises:
        UsageError: not a size.
    """
    written = text.strip().upper()
    number = written.rstrip("KMGTIB")
    try:
        value = float(number) * _UNITS[written[len(number) :]]
    except (ValueError, KeyError):
        value = 0
    if not 1 <= value < 2**63:
        raise UsageError(f"{text} is not a size: {EXPECTED}")
    return int(value)
