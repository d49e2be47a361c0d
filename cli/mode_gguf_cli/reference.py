"""docs/reference/command-line.md, made from the options' declarations: `python -m mode_gguf_cli.reference`."""

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from mode_gguf.recipe import Recipe, yaml_scalar
from mode_gguf_cli.generated import declared, flag_name, option_fields, position
from mode_gguf_cli.main import app


def reference() -> str:
    """The whole page."""
    return "\n".join([*_head(), *_commands(), *_recipe_options()]) + "\n"


def _head() -> Iterator[str]:
    yield "# Command line and recipe"
    yield ""
    yield "Made by `python -m mode_gguf_cli.reference` from `mode_gguf/options.py`; a test keeps it current."
    yield ""
    yield "Every command also has `--quiet`, which leaves results and errors, and `--help`. What the command line says"
    yield "wins over a recipe's, and `--set` over both."


def _commands() -> Iterator[str]:
    for one in app.registered_commands:
        yield from _command(str(one.name), one.callback)
    for group in app.registered_groups:
        for one in group.typer_instance.registered_commands if group.typer_instance else ():
            yield from _command(f"{group.name} {one.name or getattr(one.callback, '__name__', '')}", one.callback)


def _command(name: str, command: Any) -> Iterator[str]:
    """A command's section, from the signature that Typer reads."""
    parameters = [(one, declared(one)) for one in inspect.signature(command).parameters.values()]
    arguments = [_argument(one, info) for one, info in parameters if isinstance(info, ArgumentInfo)]
    options = [(one, info) for one, info in parameters if isinstance(info, OptionInfo) and one.name != "quiet"]
    yield from ("", f"## mode-gguf {name}", "", f"`{' '.join(['mode-gguf', name, *arguments])} [OPTIONS]`", "")
    yield inspect.cleandoc(command.__doc__ or "").replace("[bold]", "`").replace("[/bold]", "`")
    if not options:
        return
    yield from ("", "| option | meaning |", "|---|---|")
    for one, info in sorted(options, key=lambda pair: position(pair[0])):
        yield f"| `{_cell(_written(one, info))}` | {_cell(str(info.help))} |"


def _argument(parameter: inspect.Parameter, info: ArgumentInfo) -> str:
    name = str(info.metavar or parameter.name.upper())
    return name if parameter.default is inspect.Parameter.empty else f"[{name}]"


def _written(parameter: inspect.Parameter, info: OptionInfo) -> str:
    """An option as it is typed, with its value."""
    kind = _alone(parameter.annotation)
    # Within Annotated, the first name stands where a default would.
    names = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    if not names:
        spelled = parameter.name.replace("_", "-")
        names = [f"--{spelled}/--no-{spelled}" if kind is bool else f"--{spelled}"]
    if kind is bool:
        return ", ".join(names)
    choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else kind.__name__.upper()
    return f"{', '.join(names)} {info.metavar or choices}"


def _alone(annotation: Any) -> Any:
    """The type of a value that may be None, without what is said about it."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (list, Literal):
        return annotation if get_origin(annotation) is Literal else str
    types = [one for one in get_args(annotation) if one is not type(None)]
    return _alone(types[0]) if types else annotation


def _recipe_options() -> Iterator[str]:
    yield from ("", "## Options of a recipe", "")
    yield "`--set KEY=VALUE`, or the same in a file given with `--recipe`; `mode-gguf recipe` prints such a file."
    yield from ("", "| key | default | meaning |", "|---|---|---|")
    for path, value, info, flag in option_fields(Recipe()):
        option = f" (`{flag_name(path, flag)}`)" if flag else ""
        yield f"| `{'.'.join(path)}`{option} | `{yaml_scalar(value)}` | {_cell(info.description or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
