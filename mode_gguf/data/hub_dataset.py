"""Calibration samples from a data set on the Hugging Face Hub; needs the optional `datasets` package."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mode_gguf.data.passed_over import PassedOver
from mode_gguf.data.promised_media import PromisedMediaError
from mode_gguf.data.sample import Sample
from mode_gguf.data.sharegpt import sample_of_row
from mode_gguf.errors import InputError, MissingResourceError

_SHUFFLE_BUFFER = 1000
_TRIED = 10
"""Rows that are looked at for every sample, at most."""


def read_hub_dataset(name: str, *, limit: int, seed: int, passed_over: PassedOver) -> list[Sample]:
    """`limit` rows of the train split of `name`, shuffled with `seed`, without downloading the rest.

    Rows are as in `sample_of_row`; pictures are decoded by the data set, or come as encoded bytes. Rows about media
    that is not loaded are noted in `passed_over`.

    Raises:
        MissingResourceError: `datasets` is not installed, or the data set cannot be fetched.
        InputError: its rows have none of the known forms.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingResourceError(
            f"{name}: neither a file nor a folder; reading it as a data set needs the `datasets` package "
            "(pip install 'mode-gguf[datasets]')"
        ) from error
    samples: list[Sample] = []
    number = -1
    for number, row in enumerate(_rows(datasets, name, _TRIED * limit, seed)):
        try:
            samples.append(sample_of_row(row, f"{name}[{number}]", name, None))
        except PromisedMediaError as error:
            passed_over.note_row(error)
        if len(samples) == limit:
            break
    if number < 0:
        raise InputError(f"{name}: the train split is empty")
    return samples


def _rows(datasets: Any, name: str, limit: int, seed: int) -> Iterator[Any]:
    try:
        stream = datasets.load_dataset(name, split="train", streaming=True)
        yield from islice(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), limit)
    except Exception as error:  # the package raises dozens of kinds, down to those of its HTTP client
        reason = str(error).partition("\n")[0]
        raise MissingResourceError(
            f"{name}: neither a file nor a folder, nor a data set in reach ({reason})"
        ) from error
