"""Everything the library raises on purpose.

    ModeGgufError                 exit code 1   base; never raised itself
    ├── UsageError                exit code 2   options that contradict each other or make no sense
    ├── InfeasibleBudgetError     exit code 3   no assignment of types meets the size that was asked for
    ├── InputError                exit code 4   a file, tensor or value that cannot be used
    │   └── MissingResourceError  exit code 4   something that must be there is not (package, llama.cpp, disk space)
    └── ValidationError           exit code 5   the finished file does not behave as it must

Messages are one sentence a user can act on: what was read, what was expected, what was found, the way out.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

MOST_CHARACTERS = 300
"""Of another library's message that are repeated in ours."""


class ModeGgufError(Exception):
    """Base class; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(ModeGgufError):
    """Options that contradict each other or cannot mean anything."""

    exit_code = 2


class InfeasibleBudgetError(ModeGgufError):
    """No assignment of types to tensors meets the size that was asked for."""

    exit_code = 3


class InputError(ModeGgufError):
    """A file, tensor or value that cannot be used."""

    exit_code = 4


class MissingResourceError(InputError):
    """Something that must be present is not: a package, llama.cpp, a device, disk space."""


class ValidationError(ModeGgufError):
    """The finished file does not behave as it must in llama.cpp."""

    exit_code = 5


def reason(error: BaseException) -> str:
    """Kind and message of another library's exception, in one short line without control characters.

    The kind is left out of what says enough without it.
    """
    said = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]+", " ", str(error)[: 10 * MOST_CHARACTERS])
    said = " ".join(said.split())
    if len(said) > MOST_CHARACTERS:
        said = said[:MOST_CHARACTERS] + "..."
    kind = type(error).__name__
    if not said:
        return kind
    return said if isinstance(error, OSError | ValueError | ImportError) and " " in said else f"{kind}: {said}"


@contextmanager
def foreign_errors(failure: str, way_out: str = "") -> Iterator[None]:
    """Context around other people's code that is given a user's data: whatever it raises becomes an InputError.

    Tokenizers, image processors and configurations fail with every kind of exception on data they were not made for:
    KeyError, MemoryError for an absurd size, RecursionError, and pyo3's panics, which are no Exception at all.

    Args:
        failure: what could not be done with which file or sample; the reason follows in brackets.
        way_out: what to do.

    Raises:
        InputError: anything but an interruption was raised; our own errors pass.
    """
    try:
        yield
    except (ModeGgufError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{failure} ({reason(error)})" + (f"; {way_out}" if way_out else "")) from error
