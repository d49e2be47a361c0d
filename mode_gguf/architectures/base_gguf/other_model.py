"""The refusal of a base GGUF that was made from another model than the checkpoint."""

from typing import NoReturn

from mode_gguf.architectures.base_gguf.files import BaseGguf
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError


def other_model(checkpoint: Checkpoint, base: BaseGguf, what: str, *, projector: bool = False) -> NoReturn:
    """Raise the error that a base is of another model than the checkpoint.

    Args:
        what: how they differ; what is in the file comes first, as `there`, the checkpoint's as `here`.
        projector: whether it is the projector's file that does.
    """
    header = base.projector if projector and base.projector else base.text
    raise InputError(
        f"{header.files[0]}: is not made from {checkpoint.path}: {what}; convert this checkpoint with "
        "convert_hf_to_gguf.py, or give the one that the file was made from"
    )
