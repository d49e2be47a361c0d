"""Calibration samples from a data set on the Hugging Face Hub; needs the optional `datasets` package."""

from itertools import islice
from pathlib import Path

from mode_gguf.data.sample import Sample
from mode_gguf.data.sharegpt import sample_of_row
from mode_gguf.errors import InputError, MissingResourceError

_SHUFFLE_BUFFER = 1000


def read_hub_dataset(name: str, *, limit: int, seed: int) -> list[Sample]:
    """`limit` rows of the train split of `name`, shuffled with `seed`, without downloading the rest.

    Rows need `text`, or `conversations`/`messages` with an optional `image` that the data set decodes itself.

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
    try:
        stream = datasets.load_dataset(name, split="train", streaming=True)
        rows = list(islice(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), limit))
    except Exception as error:  # the package raises dozens of kinds, down to those of its HTTP client
        reason = str(error).partition("\n")[0]
        raise MissingResourceError(
            f"{name}: neither a file nor a folder, nor a data set in reach ({reason})"
        ) from error
    if not rows:
        raise InputError(f"{name}: the train split is empty")
    return [sample_of_row(row, f"{name}[{number}]", name, Path()) for number, row in enumerate(rows)]
