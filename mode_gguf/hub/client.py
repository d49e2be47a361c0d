"""The hub's client, which finds address and login by itself (HF_ENDPOINT, HF_TOKEN, `hf auth login`)."""

from typing import TYPE_CHECKING

from mode_gguf import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def hub_api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(library_name="mode-gguf", library_version=__version__)
