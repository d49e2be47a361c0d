"""Rows of chats about pictures: ShareGPT4V's form, OpenAI's and Hugging Face's messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mode_gguf.data.pictures import pictures_in
from mode_gguf.data.promised_media import (
    PromisedMediaError,
    image_marks,
    refuse_media_keys,
    refuse_other_marks,
    refuse_unordered,
)
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError
from mode_gguf.image_files import ImageSource

MOST_PICTURES: Final = 8
"""Limit of the pictures of one sample: together they are scaled down to the area of one."""
_ROLES: Final = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_IMAGE_PARTS: Final = ("image", "image_url", "input_image")
_HOLDERS: Final = ("image", "image_url", "url", "path", "base64", "bytes", "data", "source")
"""Keys of a part that may hold its picture."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A text, a picture, or a mark for one of the row's pictures."""

    text: str = ""
    picture: ImageSource | None = None
    mark: str = ""


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    parts: tuple[_Part, ...]


def sample_of_row(row: Any, origin: str, dataset: str, folder: Path | None) -> Sample:
    """The sample of one row: {"text"}, or a list of turns under `conversations` or `messages`, with pictures or none.

    A turn is {"from": "human", "value": text} or {"role": "user", "content": text or parts}. Pictures are those of
    `image` or `images`, whose places in the text `<image>` or its like marks, or parts of a content. One picture comes
    first in its turn; several are where they are marked or, where nothing is, first in the first user's turn.

    Args:
        folder: that paths are relative to; None where the row comes without files.

    Raises:
        PromisedMediaError: the row is about media that is not loaded, or has not as many marks as pictures.
        InputError: the row has none of the known forms, or names a picture that is not there; names `origin`.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{origin}: a JSON object was expected, found {type(row).__name__}")
    refuse_media_keys(row, origin)
    own = _own_pictures(row, origin, folder)
    turns = row.get("conversations") or row.get("messages")
    if "text" in row and not own and turns is None:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise InputError(f"{origin}: `text` must be a string that is not blank")
        _placed([_Turn("user", _marked(row["text"], origin))], (), origin)
        return Sample(origin, dataset, text=row["text"])
    if own and "text" in row and not turns:
        raise InputError(f"{origin}: a picture beside `text`; `conversations` or `messages` about it were expected")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{origin}: neither `text` nor a list of `conversations` was found")
    said = [_turn(turn, origin, folder) for turn in turns]
    if not any(turn.role == "user" for turn in said):
        raise InputError(f"{origin}: the conversation has no turn from `human`")
    said, unplaced = _placed(said, own, origin)
    pictures = (*unplaced, *(part.picture for turn in said for part in turn.parts if part.picture is not None))
    messages = tuple(_message(turn, alone=len(pictures) == 1) for turn in said)
    return Sample(
        origin, dataset, messages=_simplified(messages), image=pictures[0] if len(pictures) == 1 else pictures or None
    )


def _own_pictures(row: Mapping[str, Any], origin: str, folder: Path | None) -> tuple[ImageSource, ...]:
    """The row's pictures under keys of its own; the same under both is the same."""
    one, several = (pictures_in(row.get(key), origin, folder) for key in ("image", "images"))
    return several if all(picture in several for picture in one) else (*one, *several)


def _turn(turn: Any, origin: str, folder: Path | None) -> _Turn:
    if not isinstance(turn, Mapping):
        raise InputError(f"{origin}: a turn of the conversation must be an object, found {type(turn).__name__}")
    refuse_media_keys(turn, origin, read=())
    speaker = turn.get("from") or turn.get("role")
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(content, str | list):
        raise InputError(
            f"{origin}: a turn needs `from` ({', '.join(_ROLES)}) and a string `value`, found {speaker!r} and "
            f"{type(content).__name__}"
        )
    contents = [content] if isinstance(content, str) else content
    return _Turn(_ROLES[speaker], tuple(part for one in contents for part in _parts(one, origin, folder)))


def _parts(value: Any, origin: str, folder: Path | None) -> tuple[_Part, ...]:
    """What a part of a content holds: several where a text has marks."""
    if isinstance(value, str):
        return _marked(value, origin)
    if not isinstance(value, Mapping):
        raise InputError(f"{origin}: a part of a turn must be an object, found {type(value).__name__}")
    kind = value.get("type")
    if kind is None:
        kind = "text" if isinstance(value.get("text"), str) else "image" if _holds_picture(value) else "unknown"
    if kind in _TEXT_PARTS and isinstance(value.get("text"), str):
        return _marked(value["text"], origin)
    if kind in _IMAGE_PARTS:
        pictures = pictures_in(value, origin, folder) if _holds_picture(value) else (None,)
        return tuple(_Part(picture=one) if one is not None else _Part(mark="<image>") for one in pictures)
    raise PromisedMediaError(f"a part of type `{str(kind)[:40]}`", origin)


def _holds_picture(part: Mapping[str, Any]) -> bool:
    return any(part.get(key) is not None for key in _HOLDERS)


def _marked(text: str, origin: str) -> tuple[_Part, ...]:
    """A text, and the marks for pictures in it."""
    refuse_other_marks(text, origin)
    parts, end = [], 0
    for start, mark, stop in image_marks(text):
        parts += [_Part(text[end:start]), _Part(mark=mark)]
        end = stop
    return (*parts, _Part(text[end:]))


def _placed(
    turns: Sequence[_Turn], own: tuple[ImageSource, ...], origin: str
) -> tuple[list[_Turn], tuple[ImageSource, ...]]:
    """The turns with pictures in the places of marks, and the row's own pictures if no place is marked.

    Raises:
        PromisedMediaError: there are not as many marks as pictures, or one is in no user's turn.
    """
    parts = [part for turn in turns for part in turn.parts]
    marks = [part.mark for part in parts if part.mark]
    inside = tuple(part.picture for part in parts if part.picture is not None)
    if len(own) + len(inside) > MOST_PICTURES:
        raise PromisedMediaError(f"more than {MOST_PICTURES} pictures", origin)
    if any(turn.role != "user" and any(part.mark or part.picture is not None for part in turn.parts) for turn in turns):
        raise PromisedMediaError("a picture in a turn that is not the user's", origin)
    if not marks and not (own and inside):
        return list(turns), own
    if marks and not (own or inside):
        raise PromisedMediaError(f"`{marks[0][:40]}` in the text of a row without a picture", origin)
    if len(marks) != len(own or inside):
        raise PromisedMediaError("not as many marks such as `<image>` as pictures", origin)
    refuse_unordered(marks, origin)
    if not own:  # pictures in parts of their own, and marks in the texts that say where they belong
        turns = [replace(turn, parts=tuple(part for part in turn.parts if part.picture is None)) for turn in turns]
    waiting = iter(own or inside)
    return [
        replace(turn, parts=tuple(_Part(picture=next(waiting)) if part.mark else part for part in turn.parts))
        for turn in turns
    ], ()


def _message(turn: _Turn, *, alone: bool) -> Message:
    """A turn's text, stripped, and the places of its pictures in it; a picture that is `alone` comes first."""
    text, places, after_picture = "", [], False
    for part in turn.parts:
        if part.picture is not None:
            places.append(len(text))
        text += part.text.removeprefix("\n") if after_picture and not alone else part.text
        after_picture = part.picture is not None
    before, text = len(text) - len(text.lstrip()), text.strip()
    pictures = tuple(0 if alone else min(max(place - before, 0), len(text)) for place in places)
    return Message(turn.role, text, pictures)


def _simplified(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without places, where those are where pictures without places come."""
    first = next(number for number, message in enumerate(messages) if message.role == "user")
    if any(message.pictures for message in messages[first + 1 :]) or any(messages[first].pictures):
        return messages
    return tuple(replace(message, pictures=()) for message in messages)
