"""Command-line flags generated from the declarations of options (`mode_gguf.options`): a flag per field.

A command that takes a `recipe` gets the flags of the sections it names, --preset, --recipe and --set in its place;
what they say together arrives as one validated `Recipe`. --quiet is added to every command.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from typer.models import OptionInfo, ParameterInfo

from mode_gguf.errors import UsageError
from mode_gguf.options import PANELS, RECIPE, RUN, Flag
from mode_gguf.recipe import KeyPath, OptionLayer, PresetName, Recipe, nested, read_recipe, settings_layer
from mode_gguf.sizes import size_text
from mode_gguf_cli.console import be_quiet

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.", rich_help_panel=RUN)]
_PRESET = Annotated[
    PresetName | None,
    typer.Option(
        help="A shipped recipe. mode: Fisher sensitivity, one budget (default); paper: frequency times expert error, a "
        "budget per layer, as in arXiv 2606.17118; pmq: MC-MoE's.",
        show_default=False,
        rich_help_panel=RECIPE,
    ),
]
_RECIPE = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Options from a file, such as the recipe.yaml of an earlier run; those of the command line win.",
        show_default=False,
        rich_help_panel=RECIPE,
    ),
]
_SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One option of the recipe, such as plan.refine=2; may be repeated.",
        show_default=False,
        rich_help_panel=RECIPE,
    ),
]
_NATIVE: Final = (int, float, str, Path, bool)


def with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --quiet as its last option."""

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool = False, **named: Any) -> None:
        if quiet:
            be_quiet()
        command(*arguments, **named)

    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    return _signed(run, [*inspect.signature(command).parameters.values(), option])


def with_recipe(*sections: str, everyday: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for commands whose parameter `recipe` is a `Recipe`.

    Args:
        sections: of the recipe whose flags the command has; one alone of a section as `section.option`.
        everyday: only flags of everyday use.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        flags = {"_".join(path): (path, info, flag) for path, info, flag in _flags(sections, everyday=everyday)}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            layers = [OptionLayer({})]
            if (file := given.pop("recipe")) is not None:
                layers.append(read_recipe(file))
            settings: Sequence[str] = given.pop("settings") or ()
            preset = given.pop("preset")
            values = {path: given.pop(name) for name, (path, _, _) in flags.items()}
            layers.append(_layer(values, {path: flag for path, _, flag in flags.values()}, preset))
            if settings:
                layers.append(settings_layer(settings))
            command(**given, recipe=Recipe.of(*layers))

        own = [one for name, one in inspect.signature(command).parameters.items() if name != "recipe"]
        made = [_option(name, *found) for name, found in flags.items()]
        common = [_keyword("preset", _PRESET), _keyword("recipe", _RECIPE), _keyword("settings", _SET)]
        return _signed(run, sorted([*own, *made, *common], key=position))

    return decorated


def with_options(name: str, options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for commands whose parameter `name` is an object of one class of options."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        found = {one.name: described(options, one.name) for one in fields(options)}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {key: given.pop(key) for key in found}
            command(**given, **{name: options(**{key: value for key, value in values.items() if value is not None})})

        own = [one for parameter, one in inspect.signature(command).parameters.items() if parameter != name]
        made = [_option(key, (key,), info, flag) for key, (info, flag) in found.items() if flag]
        return _signed(run, sorted([*own, *made], key=position))

    return decorated


def _flags(sections: Sequence[str], *, everyday: bool) -> Iterator[tuple[KeyPath, FieldInfo, Flag]]:
    """Fields of a recipe's sections that are flags, with their places."""
    recipe = Recipe()
    for section, _, only in (one.partition(".") for one in sections):
        for path, _, info, flag in option_fields(getattr(recipe, section), (section,)):
            if flag is not None and (flag.everyday or not everyday) and only in ("", path[-1]):
                yield path, info, flag


def option_fields(options: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, FieldInfo, Flag | None]]:
    """Every field of options and of the options within: its place, value, declaration, and flag if it has one."""
    for one in fields(options):
        value, path = getattr(options, one.name), (*at, one.name)
        if is_dataclass(value):
            yield from option_fields(value, path)
        else:
            yield path, value, *described(type(options), one.name)


def described(options: type[Any], name: str) -> tuple[FieldInfo, Flag | None]:
    """A field's declaration, and its flag if it has one."""
    info: FieldInfo = options.__pydantic_fields__[name]
    return info, next((one for one in info.metadata if isinstance(one, Flag)), None)


def flag_name(path: KeyPath, flag: Flag) -> str:
    """The command-line flag of a field."""
    return flag.name or "--" + path[-1].replace("_", "-")


def _option(name: str, path: KeyPath, info: FieldInfo, flag: Flag) -> inspect.Parameter:
    """A parameter as Typer reads it; None stands for "not given", so that a recipe's value is not overridden."""
    kind = _command_line_type(info.annotation)
    if kind is int and _parses_text(info):
        kind = str
    spelled = flag_name(path, flag)
    two_ways = kind is bool and info.default is True and "/" not in spelled
    names = [f"{spelled}/--no-{spelled[2:]}" if two_ways else spelled]
    if flag.short:
        names.append(flag.short)
    default = info.get_default(call_default_factory=True)
    option = typer.Option(
        *names,
        metavar=flag.metavar,
        help=" ".join([*(info.description or "").split(), *_default_sentence(default, flag)]),
        show_default=False,
        rich_help_panel=flag.panel,
    )
    return _keyword(name, Annotated[kind | None, option])


def _command_line_type(annotation: Any) -> Any:
    """The type that Typer reads: a field's own where it is one word, text for what the field parses itself."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is dict:
        return list[str]
    arguments = [one for one in get_args(annotation) if one is not type(None)]
    if get_origin(annotation) is Literal:
        return annotation
    if len(arguments) == 1:
        return _command_line_type(arguments[0])
    return annotation if annotation in _NATIVE else str


def _parses_text(info: FieldInfo) -> bool:
    """Whether a field reads words such as 24GiB, alone or beside None."""
    stated = [*info.metadata, *(one for kind in get_args(info.annotation) for one in get_args(kind))]
    return any(isinstance(one, BeforeValidator) for one in stated)


def _default_sentence(default: Any, flag: Flag) -> list[str]:
    if default in (None, (), {}) or isinstance(default, bool):
        return []
    return [f"Default: {size_text(default) if flag.metavar == 'SIZE' else default}."]


def _layer(values: dict[KeyPath, Any], flags: dict[KeyPath, Flag], preset: str | None) -> OptionLayer:
    """The options that were given on the command line."""
    merged: dict[str, Any] = {"preset": preset} if preset else {}
    for path, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = _mapping(value, flag_name(path, flags[path]))
        section = merged
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section |= nested(path[-1:], value)
    return OptionLayer(merged, labels={path: flag_name(path, flag) for path, flag in flags.items()})


def _mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    for pair in pairs:
        if not all(pair.partition("=")):
            raise UsageError(f"{option} {pair}: write a name, = and a value")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def declared(parameter: inspect.Parameter) -> ParameterInfo | None:
    """The declaration of an argument or an option of a command."""
    found = getattr(parameter.annotation, "__metadata__", ())
    return next((one for one in found if isinstance(one, ParameterInfo)), None)


def position(parameter: inspect.Parameter) -> int:
    """Arguments first, then options by panel."""
    found = declared(parameter)
    if not isinstance(found, OptionInfo):
        return -1
    return PANELS.index(found.rich_help_panel) if found.rich_help_panel in PANELS else len(PANELS)


def _signed(run: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The function with the signature that Typer reads."""
    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in keywords}
    return run
