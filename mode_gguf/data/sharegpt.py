"""ShareGPT4V's format of chats about images: JSON, one sample a line."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mode_gguf.artifacts import read_json_lines
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_sharegpt(path: Path, dataset: str) -> Iterator[Sample]:
    """Samples of a JSON lines file of {"image": path, "conversations": [{"from": "human", "value": ...}, ...]}.

    `image` is relative to the file and may be left out for a chat without one; {"text": ...} is a plain text. The
    placeholder `<image>` is taken out of the turns: the image always comes first.

    Raises:
        InputError: a line is not such an object, or its image does not exist; names file and line.
    """
    for row, origin in read_json_lines(path):
        yield sample_of_row(row, origin, dataset, path.parent)


def sample_of_row(row: Any, origin: str, dataset: str, folder: Path) -> Sample:
    """The sample of one row; `image` may be a path relative to `folder` or a PIL image.

    Raises:
        InputError: the row has none of the known forms; names `origin`.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{origin}: a JSON object was expected, found {type(row).__name__}")
    image = _image(row.get("image"), origin, folder)
    if "text" in row and image is None and "conversations" not in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise InputError(f"{origin}: `text` must be a string that is not blank")
        return Sample(origin, dataset, text=row["text"])
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{origin}: neither `text` nor a list of `conversations` was found")
    messages = tuple(_message(turn, origin) for turn in turns)
    if not any(message.role == "user" for message in messages):
        raise InputError(f"{origin}: the conversation has no turn from `human`")
    return Sample(origin, dataset, messages=messages, image=image)


def _image(value: Any, origin: str, folder: Path) -> Path | Image.Image | None:
    if value is None or isinstance(value, Image.Image):
        return value
    if not isinstance(value, str):
        raise InputError(f"{origin}: `image` must be a path, found {type(value).__name__}")
    path = folder / value
    if not path.is_file():
        raise InputError(f"{origin}: image {path} does not exist")
    return path


def _message(turn: Any, origin: str) -> Message:
    if not isinstance(turn, Mapping):
        raise InputError(f"{origin}: a turn of the conversation must be an object, found {type(turn).__name__}")
    speaker = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(text, str):
        raise InputError(
            f"{origin}: a turn needs `from` ({', '.join(_ROLES)}) and a string `value`, found {speaker!r} and "
            f"{type(text).__name__}"
        )
    return Message(_ROLES[speaker], text.replace(IMAGE_PLACEHOLDER, "").strip())
