"""Calibration samples: texts, and chats about one image, from files, folders, the Hub or the built-in set."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mode_gguf.artifacts import read_sample_text
from mode_gguf.data.default_calibration import default_samples
from mode_gguf.data.hub_dataset import read_hub_dataset
from mode_gguf.data.sample import Message, Sample
from mode_gguf.data.sharegpt import read_sharegpt
from mode_gguf.errors import InputError, MissingResourceError, UsageError

__all__ = ["Message", "Sample", "load_samples"]

CHARACTERS_PER_TOKEN = 4
"""Assumed characters per token for cutting text files; the exact length is enforced when the inputs are built."""


def load_samples(
    source: str | None = None,
    *,
    max_image_samples: int = 128,
    max_text_samples: int = 128,
    text_tokens: int = 512,
    seed: int = 0,
) -> list[Sample]:
    """Samples of `source`, at most so many of each kind, in a fixed order.

    Args:
        source: None for the built-in set; a folder of `*.jsonl` (ShareGPT4V form) and `*.txt` files, found at any
            depth; one such file; or the name of a Hugging Face data set (needs the `datasets` extra).
        max_image_samples: samples with an image that are kept; which ones is drawn with `seed`.
        max_text_samples: samples without one that are kept.
        text_tokens: approximate length in tokens of the excerpts that text files are cut into.
        seed: of the draw.

    Raises:
        UsageError: both limits are zero, or a limit is negative.
        InputError: a file is malformed, an image broken (the message names file and line), or nothing was found.
        MissingResourceError: `source` is neither a path nor a data set that can be fetched.
    """
    if min(max_image_samples, max_text_samples) < 0 or max_image_samples + max_text_samples == 0:
        raise UsageError(
            f"sample limits are {max_image_samples} (image) and {max_text_samples} (text): none may be negative, "
            "one must be positive"
        )
    samples = _all_samples(source, max_image_samples + max_text_samples, text_tokens, seed)
    images = _draw([sample for sample in samples if sample.has_image], max_image_samples, seed)
    texts = _draw([sample for sample in samples if not sample.has_image], max_text_samples, seed)
    if not images and not texts:
        raise InputError(f"{source}: no calibration sample of the kinds asked for was found")
    for sample in images:
        sample.open_image()  # a broken image should stop the run now, not an hour into it
    return images + texts


def _all_samples(source: str | None, limit: int, text_tokens: int, seed: int) -> list[Sample]:
    if source is None:
        return default_samples()
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in {".jsonl", ".txt"} and file.is_file())
        if not files:
            raise InputError(f"{path}: folder holds no *.jsonl and no *.txt file")
        dataset = path.resolve().name
    elif path.is_file():
        files, dataset = [path], path.stem
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return read_hub_dataset(source, limit=limit, seed=seed)
    else:
        raise MissingResourceError(
            f"{source}: no such file or folder, and no name of a Hugging Face data set (owner/name) either"
        )
    return [
        sample
        for file in files
        for sample in (
            read_sharegpt(file, dataset) if file.suffix == ".jsonl" else read_text(file, dataset, text_tokens)
        )
    ]


def read_text(path: Path, dataset: str, text_tokens: int) -> Iterator[Sample]:
    """Excerpts of about `text_tokens` tokens of a UTF-8 text file.

    Raises:
        InputError: the file is not UTF-8.
    """
    try:
        text = read_sample_text(path)
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, excerpt in enumerate(split_text(text, text_tokens * CHARACTERS_PER_TOKEN)):
        yield Sample(f"{path}#{number}", dataset, text=excerpt)


def split_text(text: str, size: int) -> Iterator[str]:
    """Excerpts of at most `size` characters, ending at a line break or space where there is one; blank ones dropped."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            breaks = (text.rfind(separator, start + size // 2, end) for separator in ("\n\n", "\n", " "))
            end = next((found + 1 for found in breaks if found > start), end)
        excerpt = text[start:end]
        if excerpt.strip():
            yield excerpt
        start = end


def _draw(samples: Sequence[Sample], limit: int, seed: int) -> list[Sample]:
    """A seeded random draw of `limit` samples, in their own order."""
    if len(samples) <= limit:
        return list(samples)
    return [samples[index] for index in sorted(random.Random(seed).sample(range(len(samples)), limit))]
