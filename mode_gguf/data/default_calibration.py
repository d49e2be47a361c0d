"""The built-in calibration set: made of installed files without a download, always the same.

Mixed on purpose. Experts specialise, so a set of one kind leaves many of them without tokens: there are photographs,
crops of them, charts, tables and documents with varied questions, and prose, code, instructions and fifteen languages.
"""

import importlib
import inspect
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics

from mode_gguf.data.generated_images import generated_samples
from mode_gguf.data.photographs import photograph_samples
from mode_gguf.data.sample import Message, Sample

BUILT_IN = "mode-gguf built-in"
"""Name under which the set is recorded."""

_MAX_CHARACTERS = 1600
_CODE_MODULES = (
    "bisect", "calendar", "cmd", "colorsys", "csv", "difflib", "fractions", "graphlib", "heapq", "html.parser",
    "json.decoder", "shlex", "statistics", "string", "textwrap", "zipfile",
)  # fmt: skip
_TOPICS = (
    "atom-identifiers", "assignment", "binary", "class", "comparisons", "context-managers", "debugger",
    "dynamic-features", "exceptions", "execmodel", "formatstrings", "import", "numbers", "objects", "strings", "try",
)  # fmt: skip
_DATASET_PAGES = ("breast_cancer", "california_housing", "diabetes", "digits", "iris", "linnerud", "rcv1", "wine_data")


def default_samples() -> list[Sample]:
    """At least 64 samples with an image and 64 without."""
    return [*photograph_samples(BUILT_IN), *generated_samples(BUILT_IN), *_texts()]


def _texts() -> Iterator[Sample]:
    texts = json.loads(resources.files(__package__).joinpath("default_texts.json").read_text(encoding="utf-8"))
    for language, text in texts["languages"].items():
        yield Sample(f"{BUILT_IN}: {language}", BUILT_IN, text=text)
    for number, turn in enumerate(texts["instructions"]):
        messages = (Message("user", turn["question"]), Message("assistant", turn["answer"]))
        yield Sample(f"{BUILT_IN}: instruction {number}", BUILT_IN, messages=messages)
    for name in _TOPICS:
        yield Sample(f"{BUILT_IN}: topic {name}", BUILT_IN, text=topics[name].strip()[:_MAX_CHARACTERS])
    for name in _CODE_MODULES:
        source = inspect.getsource(importlib.import_module(name))
        middle = source.index("\n", len(source) // 3) + 1
        yield Sample(f"{BUILT_IN}: source {name}", BUILT_IN, text=source[middle : middle + _MAX_CHARACTERS])
    import sklearn  # a second to import: only when the set is made

    pages = Path(sklearn.__file__).parent / "datasets" / "descr"
    for name in _DATASET_PAGES:
        text = (pages / f"{name}.rst").read_text(encoding="utf-8")
        yield Sample(f"{BUILT_IN}: page {name}", BUILT_IN, text=text[:_MAX_CHARACTERS])
