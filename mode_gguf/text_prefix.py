"""The beginning of a long text that is enough for its first tokens: a file's one line may be all of a book."""

from collections.abc import Callable
from typing import Final

_CHARACTERS: Final = 32
"""Characters per token that are taken at first; tokens of prose have four, of many blanks a hundred and more."""
_MARGIN: Final = 2
"""Tokens that the beginning must have, in parts of those that are used: where it ends, the last ones may differ."""
_GROWTH: Final = 4


def sufficient_prefix(text: str, n_tokens: int, count: Callable[[str], int]) -> str:
    """The beginning of `text` that has the same first `n_tokens` tokens; all of it where it is not much longer.

    Args:
        count: number of tokens of a text.
    """
    size = _CHARACTERS * n_tokens
    while size < len(text) and count(text[:size]) < _MARGIN * n_tokens:
        size *= _GROWTH
    return text[:size]
