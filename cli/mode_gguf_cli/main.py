"""Entry point: gathers the commands and turns expected failures into one line and an exit code."""

import errno
import sys
from pathlib import Path

import typer

from mode_gguf.errors import InputError, ModeGgufError
from mode_gguf.forward import distributed
from mode_gguf_cli.commands import (
    calibrate,
    convert,
    doctor,
    export,
    frontier,
    inspect,
    plan,
    publish,
    recipe,
    report,
    run,
    runtime,
    sensitivity,
    unit_kl,
    validate,
)
from mode_gguf_cli.console import fail, log_to_stderr, say
from mode_gguf_cli.generated import with_quiet

app = typer.Typer(
    help="Turn a Mixture-of-Experts vision-language checkpoint into a mixed-precision GGUF and its projector, "
    "ready for stock llama.cpp. Start with [bold]mode-gguf convert MODEL --bpw 3.0[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

INTERRUPTED = 130

for module in (
    convert,
    recipe,
    calibrate,
    sensitivity,
    unit_kl,
    frontier,
    plan,
    export,
    validate,
    report,
    inspect,
    run,
    publish,
    doctor,
):
    app.command(module.__name__.rpartition(".")[2].replace("_", "-"))(with_quiet(module.command))
app.add_typer(runtime.app, name="runtime")


def main() -> None:
    """Run the command line; exit codes are in `mode_gguf.errors`, 130 is Ctrl-C.

    Of several processes that torchrun started, the first does so, and the others help it with what can be shared out.
    """
    log_to_stderr()
    try:
        _run()
    except SystemExit as ended:
        distributed.end_process(ended.code)
        raise


def _run() -> None:
    try:
        if distributed.is_follower():
            distributed.follow()
            sys.exit()
        _check_readable(*sys.argv[1:], str(Path.cwd()))
        with distributed.leading():
            app()
    except ModeGgufError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail("the disk is full; free some space or choose another folder with --out")
        else:
            fail(str(error))
        sys.exit(4)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # how Typer ends on Ctrl-C
            say("interrupted; finished stages are kept and will be reused")
        raise
    except KeyboardInterrupt:  # in a process that helps: the first one has something to say about it
        sys.exit(INTERRUPTED)


def _check_readable(*words: str) -> None:
    """Refuse paths that are no text: they can stand in no report, and neither tokenizers nor llama.cpp open them."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word}: has bytes that are not UTF-8; rename that file or folder") from None
