"""--quiet, which every command has and none needs to know about."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mode_gguf_cli.console import be_quiet

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")]


def with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --quiet as its last option."""

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool = False, **named: Any) -> None:
        if quiet:
            be_quiet()
        command(*arguments, **named)

    signature = inspect.signature(command)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option]
    )
    run.__annotations__ = {**command.__annotations__, "quiet": Quiet}
    return run
