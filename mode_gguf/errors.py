"""Everything the library raises on purpose.

    ModeGgufError                 exit code 1   base; never raised itself
    ├── UsageError                exit code 2   options that contradict each other or make no sense
    ├── InfeasibleBudgetError     exit code 3   no assignment of types meets the size that was asked for
    ├── InputError                exit code 4   a file, tensor or value that cannot be used
    │   └── MissingResourceError  exit code 4   something that must be there is not (package, llama.cpp, disk space)
    └── ValidationError           exit code 5   the finished file does not behave as it must

Messages are one sentence a user can act on: what was read, what was expected, what was found, the way out.
"""


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
