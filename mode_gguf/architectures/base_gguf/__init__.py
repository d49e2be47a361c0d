"""Models without a family: names, metadata and tensors from GGUF files that stock conversion made."""

from mode_gguf.architectures.base_gguf.files import BaseGguf, copied_keys, open_base

__all__ = ["BaseGguf", "copied_keys", "open_base"]
