"""Translation of the hub client's exceptions into this package's errors."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mode_gguf.errors import InputError, MissingResourceError, ModeGgufError

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_SECRETS = re.compile(r"hf_\w+|(?<=\?)[^\s'\"]+")
"""Tokens, and queries of addresses, which may be signed."""
_REASONS = {
    401: f"the hub does not accept the login; {_LOG_IN}",
    403: f"the hub refuses (403), the token may not do this; {_LOG_IN} with one that may",
    404: "the hub knows no such thing (404)",
    409: "something else changed it meanwhile (409); run the command again",
    429: "the hub asks to wait (429); run the command again later",
}


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Context that raises the hub client's exceptions as errors of this package about `what`, with the way out.

    Raises:
        InputError: `what` is not on the hub, or not as it is named.
        MissingResourceError: no access to it, no connection, no disk space, or the hub fails.
    """
    try:
        yield
    except ModeGgufError:
        raise
    except Exception as error:  # its HTTP clients, of which there are several, raise dozens of kinds
        raise _as_error(what, _cause(error)) from error


def _as_error(what: str, error: BaseException) -> InputError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return MissingResourceError(f"{what}: nobody is logged in to the hub; {_LOG_IN}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{what}: no name that the hub allows ({_first_line(error)})")
    if isinstance(error, errors.GatedRepoError):
        return MissingResourceError(
            f"{what}: access has to be asked for; accept the conditions on its page on the hub, then {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{what}: the repository has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{what}: no such repository on the hub, or a private one; check the name, or {_LOG_IN}, if it is yours"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        reason = _REASONS.get(status, f"the hub fails ({status}: {_first_line(error)}); run the command again later")
        return MissingResourceError(f"{what}: {reason}")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return MissingResourceError(
            f"{what}: not in the hub's cache here, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MissingResourceError(f"{what}: the disk is full; free some space, or set HF_HOME to a larger disk")
    if isinstance(error, ValueError):
        return InputError(f"{what}: {_first_line(error)}")
    return MissingResourceError(
        f"{what}: the hub cannot be reached, or broke off ({_first_line(error)}); run the command again to go on"
    )


def _cause(error: BaseException) -> BaseException:
    """The cause of a RuntimeError that only wraps another exception."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without tokens and signed queries."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SECRETS.sub("...", lines[0]) if lines else type(error).__name__
