"""Calibration samples: texts, and chats with or without pictures, from files, folders, the Hub or the built-in set."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mode_gguf.data.default_calibration import default_samples
from mode_gguf.data.hub_dataset import read_hub_dataset
from mode_gguf.data.passed_over import PassedOver
from mode_gguf.data.promised_media import PromisedMediaError
from mode_gguf.data.sample import Message, Sample
from mode_gguf.data.sharegpt import sample_of_row
from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.sample_files import (
    AS_JSON_LINES,
    JSON_SUFFIXES,
    OTHER_TABLES,
    holds_rows,
    mentions_samples,
    read_sample_text,
    rows_of,
)

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

    Rows about media that is not loaded, and files of other kinds, are passed over; one warning says how many of which.

    Args:
        source: None for the built-in set; a folder of files with JSON rows (`sharegpt.sample_of_row`) and `*.txt`,
            found at any depth; one such file; or the name of a Hugging Face data set (needs the `datasets` extra).
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
    passed_over = PassedOver()
    samples = _all_samples(source, passed_over, max_image_samples + max_text_samples, text_tokens, seed)
    images = _draw([sample for sample in samples if sample.has_image], max_image_samples, seed)
    texts = _draw([sample for sample in samples if not sample.has_image], max_text_samples, seed)
    if not images and not texts:
        reason = f" ({passed_over})" if str(passed_over) else ""
        raise InputError(f"{source}: no calibration sample of the kinds asked for was found{reason}")
    for sample in images:
        sample.open_images()  # a broken image should stop the run now, not an hour into it
    passed_over.say(f"calibration data {source}")
    return images + texts


def _all_samples(source: str | None, passed_over: PassedOver, limit: int, text_tokens: int, seed: int) -> list[Sample]:
    if source is None:
        return default_samples()
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, passed_over, text_tokens)
    if path.exists():
        if path.suffix.lower() in OTHER_TABLES:
            raise InputError(f"{path}: {path.suffix} files are not read; {AS_JSON_LINES}")
        return list(_of_file(path, path.stem, passed_over, text_tokens))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return read_hub_dataset(source, limit=limit, seed=seed, passed_over=passed_over)
    raise MissingResourceError(
        f"{source}: no such file or folder, and no name of a Hugging Face data set (owner/name) either"
    )


def _of_folder(folder: Path, passed_over: PassedOver, text_tokens: int) -> list[Sample]:
    """Samples of all files of a folder that are JSON or text by their endings; notes the others."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir())
    read = [file for file in files if file.suffix.lower() in (*JSON_SUFFIXES, ".txt") and file.is_file()]
    dataset = folder.resolve().name
    samples = [
        sample for file in read for sample in _of_file(file, dataset, passed_over, text_tokens, among_others=True)
    ]
    pictures = {image for sample in samples for image in sample.images if isinstance(image, Path)}
    used = {*read, *pictures, *(picture.resolve() for picture in pictures)}
    for file in files:
        if file not in used and file.resolve() not in used and not file.name.startswith("."):
            passed_over.files[file.suffix.lower()] += 1
    if not read:
        found = f" ({passed_over})" if passed_over.files else ""
        raise InputError(f"{folder}: folder holds no *.json, no *.jsonl and no *.txt file{found}")
    return samples


def _of_file(
    path: Path, dataset: str, passed_over: PassedOver, text_tokens: int, *, among_others: bool = False
) -> Iterator[Sample]:
    """Samples of a file: of its rows, or excerpts of about `text_tokens` tokens of its text.

    Args:
        among_others: of a folder, where a JSON file may describe the data set and hold no samples.

    Raises:
        InputError: it cannot be read, or a row has none of the known forms.
    """
    text = read_sample_text(path)
    if among_others and path.suffix.lower() == ".json" and not mentions_samples(text):
        passed_over.files[".json"] += 1
        return
    if not holds_rows(path, text):
        for number, excerpt in enumerate(split_text(text, text_tokens * CHARACTERS_PER_TOKEN)):
            yield Sample(f"{path}#{number}", dataset, text=excerpt)
        return
    for row, origin in rows_of(path, text):
        try:
            yield sample_of_row(row, origin, dataset, path.parent)
        except PromisedMediaError as error:
            passed_over.note_row(error)


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
