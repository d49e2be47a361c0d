"""Typed access to config.json, which comes from elsewhere and may lack or mistype anything."""

from collections.abc import Mapping
from typing import Any, TypeVar

from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.errors import InputError

T = TypeVar("T")


def section(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """The object `name` of config.json, such as `text_config`.

    Raises:
        InputError: it is missing or not an object.
    """
    value = checkpoint.config.get(name)
    if not isinstance(value, dict):
        raise InputError(f"{checkpoint.path / 'config.json'}: expected an object {name}, found {value!r}")
    return value


def setting(checkpoint: Checkpoint, where: Mapping[str, Any], expected: type[T], *names: str) -> T:
    """The first of `names` that `where` (a section of config.json) has, as an `expected`; ints pass for floats.

    Raises:
        InputError: none of the names is there, or the value has another type.
    """
    for name in names:
        if where.get(name) is None:
            continue
        value = where[name]
        if expected is float and type(value) is int:
            value = float(value)
        if not isinstance(value, expected) or (expected is not bool and isinstance(value, bool)):
            break
        return value
    else:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: {' or '.join(names)} ({expected.__name__}) is missing; "
            "use the configuration published with the model"
        )
    raise InputError(
        f"{checkpoint.path / 'config.json'}: {name} is {value!r}, expected {expected.__name__}; "
        "use the configuration published with the model"
    )


def preprocessor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """preprocessor_config.json, or its place in the processor_config.json that transformers 5 writes."""
    old, new = checkpoint.path / "preprocessor_config.json", checkpoint.path / "processor_config.json"
    if old.exists() or not new.exists():
        return read_json(old)
    value = read_json(new).get("image_processor")
    if not isinstance(value, dict):
        raise InputError(f"{new}: expected an object image_processor, found {value!r}; download it again")
    return value


def check_settings(checkpoint: Checkpoint, gguf_arch: str, settings: Mapping[str, tuple[Any, Any, str]]) -> None:
    """Refuse settings that llama.cpp's `gguf_arch` has no place for.

    Args:
        settings: by name, the value found, the only one that will do, and why ("always gates with silu").

    Raises:
        InputError: naming the first setting with another value.
    """
    for name, (found, wanted, reason) in settings.items():
        if found != wanted:
            raise InputError(
                f"{checkpoint.path / 'config.json'}: {name} is {found!r}, expected {wanted!r}: llama.cpp's "
                f"{gguf_arch} {reason}; the file would not compute what the checkpoint does"
            )
