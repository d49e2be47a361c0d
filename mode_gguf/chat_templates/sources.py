"""The chat template of a checkpoint: which of the places that may hold one counts."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mode_gguf.checkpoint.folder import read_json
from mode_gguf.checkpoint.text_files import read_text_file
from mode_gguf.errors import InputError

log = logging.getLogger(__name__)

_SURROGATES = re.compile("[\ud800-\udfff]")

DEFAULT = "default"
JINJA = "chat_template.jinja"
FURTHER = "additional_chat_templates"
CONFIGURATIONS = ("processor_config.json", "chat_template.json", "tokenizer_config.json")
"""Files that may have `chat_template`, a template or several with names, first one first."""


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """A checkpoint's chat templates.

    Attributes:
        default: Jinja source; None where it has none.
        file: that holds it; where it would be expected if there is none.
        named: further templates by name, such as `tool_use`.
        overruled: files with another default.
    """

    default: str | None
    file: Path
    named: Mapping[str, str] = field(default_factory=dict)
    overruled: tuple[Path, ...] = ()

    def required(self) -> str:
        """The default template.

        Raises:
            InputError: there is none.
        """
        if self.default is None:
            raise InputError(
                f"{self.file.parent}: no chat template found, neither {JINJA} nor one in {', '.join(CONFIGURATIONS)}; "
                f"add the {JINJA} that the model was published with"
                + (f" (there are others: {', '.join(sorted(self.named))})" if self.named else "")
            )
        return self.default


def chat_templates(folder: Path) -> ChatTemplates:
    """The chat templates of a checkpoint folder, by transformers' rule.

    A file of its own comes before the tokenizer's configuration, and `chat_template.jinja` before the formats that it
    has replaced. Where a tokenizer and a processor of transformers would read different ones, this is what they agree
    on where they can: the tokenizer reads no chat_template.json, and the processor no tokenizer_config.json.

    Raises:
        InputError: one of the files cannot be read, or holds something else than templates.
    """
    found = [(file, templates) for file, templates in _all(folder) if templates]
    named: dict[str, str] = {}
    for _, templates in reversed(found):
        named |= templates
    named.pop(DEFAULT, None)
    for file, templates in found:
        if any(_SURROGATES.search(text) for text in (*templates, *templates.values())):
            raise InputError(f"{file}: the chat template is no Unicode text; download the file again")
    defaults = [(file, templates[DEFAULT]) for file, templates in found if DEFAULT in templates]
    if not defaults:
        return ChatTemplates(None, folder / JINJA, named)
    file, default = defaults[0]
    return ChatTemplates(default, file, named, tuple(other for other, text in defaults[1:] if text != default))


@cache
def log_choice(file: Path, overruled: tuple[Path, ...]) -> None:
    """Say once which template is used where files of a checkpoint hold different ones."""
    text = "%s: the chat template of %s is used, in the GGUF file too; another one in %s is not"
    if overruled:
        log.warning(text, file.parent, file.name, ", ".join(path.name for path in overruled))


def _all(folder: Path) -> list[tuple[Path, Mapping[str, str]]]:
    """Every place with its templates by name, first one first."""
    own, further = folder / JINJA, folder / FURTHER
    places: list[tuple[Path, Mapping[str, str]]] = []
    if own.exists():
        places.append((own, {DEFAULT: read_text_file(own)}))
    if further.is_dir():
        files = sorted(further.glob("*.jinja"))
        places.append((further, {path.stem: read_text_file(path) for path in files if path.stem != DEFAULT}))
    for name in CONFIGURATIONS:
        path = folder / name
        if path.exists():
            places.append((path, _of_configuration(path, read_json(path).get("chat_template"))))
    return places


def _of_configuration(path: Path, found: Any) -> Mapping[str, str]:
    """`chat_template` of a configuration: a template, a list of names and templates, or an object of them."""
    match found:
        case None:
            return {}
        case str():
            return {DEFAULT: found}
        case dict() if all(isinstance(text, str) for text in found.values()):
            return found
        case list() if all(isinstance(entry, dict) for entry in found):
            named = {entry.get("name"): entry.get("template") for entry in found}
            if all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
                return {str(name): str(text) for name, text in named.items()}
    raise InputError(
        f"{path}: chat_template is {type(found).__name__}, expected a template, or a list of objects with a name and "
        "a template; download the file again"
    )
