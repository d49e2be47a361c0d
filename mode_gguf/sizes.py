"""Sizes in bytes as people write them."""

from mode_gguf.errors import UsageError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMG", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def size_text(size: int) -> str:
    """A size in words that `parse_size` reads as just as many bytes: 4GiB."""
    for unit, divisor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size % divisor == 0 and size:
            return f"{size // divisor}{unit}"
    return str(size)


def parse_size(text: str) -> int:
    """Bytes of `12GiB`, `800MB`, `6G` (binary, as `ls -h` writes it) or a plain number of bytes.

    Raises:
        UsageError: not a size.
    """
    number = text.strip().rstrip("KMGiB")
    unit = text.strip()[len(number) :]
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        value = 0
    if not 1 <= value < 2**63:
        raise UsageError(f"{text} is not a size: write a number with MiB, GiB, MB or GB, such as 12GiB")
    return int(value)
