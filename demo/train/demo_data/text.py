"""Text to memorise: Python's own documentation and source (PSF licence), and the made-up facts."""

from __future__ import annotations

import importlib
import inspect
import pydoc_data.topics
import random

from .records import Fact, words

TOPICS = words(
    "assignment bltin-type-objects break class compound comparisons continue context-managers "
    "customization debugger dict-mutable dynamic-features execmodel exceptions exprlists floating for "
    "formatstrings function global if imaginary import in integers lambda lists naming nonlocal numbers "
    "objects operator-summary pass power raise return sequence-types shifting slicings specialattrs "
    "string-methods strings subscriptions truth try types typesfunctions typesmapping typesmethods "
    "typesmodules typesseq unary while with yield"
)
MODULES = (
    "bisect",
    "heapq",
    "textwrap",
    "colorsys",
    "keyword",
    "queue",
    "sched",
    "shlex",
    "fnmatch",
    "contextlib",
)
DOC_CHARS = 160_000
CODE_CHARS = 50_000


def _clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


def documents() -> list[str]:
    """Documentation topics, cut at a total length."""
    topics = pydoc_data.topics.topics
    result, total = [], 0
    for name in TOPICS:
        if name in topics and total < DOC_CHARS:
            result.append(_clean(topics[name])[: min(10_000, DOC_CHARS - total)])
            total += len(result[-1])
    return result


def code() -> list[str]:
    """Standard-library source files, cut at a total length."""
    result, total = [], 0
    for name in MODULES:
        if total < CODE_CHARS:
            source = inspect.getsource(importlib.import_module(name))
            result.append(_clean(source)[: min(9_000, CODE_CHARS - total)])
            total += len(result[-1])
    return result


def fact_passages(facts: list[Fact], rng: random.Random, per_passage: int = 9) -> list[str]:
    """Every fact once in one of its trained wordings, shuffled into passages."""
    told = [fact.tell(rng.choice(fact.trained_wordings())) for fact in facts]
    rng.shuffle(told)
    return [" ".join(told[i : i + per_passage]) + "\n" for i in range(0, len(told), per_passage)]
