"""The hub's client, which finds address and login by itself (HF_ENDPOINT, HF_TOKEN, `hf auth login`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mode_gguf import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def hub_api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(library_name="mode-gguf", library_version=__version__)


@contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """Context without the client's own progress bars, which ignore where the output goes and collide with ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
