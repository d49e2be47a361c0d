"""Recipes: all options of a conversion in one YAML file, with shipped ones as presets.

A recipe names what differs from the preset it builds on. What a run used is written whole beside its plan.json, and
that file given back reproduces the run.
"""

import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from mode_gguf.artifacts import write_text
from mode_gguf.errors import InputError, ModeGgufError, UsageError
from mode_gguf.options import (
    STRICT,
    CalibrationOptions,
    CheckpointOptions,
    ComputeOptions,
    ExportOptions,
    PlanOptions,
    SensitivityOptions,
    ValidationOptions,
)
from mode_gguf.regular_files import check_regular

PresetName: TypeAlias = Literal["mode", "paper", "pmq"]
"""`mode`: Fisher sensitivity and one budget; `paper`: MODE as published; `pmq`: MC-MoE's."""
PRESET_NAMES: Final[tuple[PresetName, ...]] = get_args(PresetName)
SHIPPED: Final = Path(__file__).with_name("recipes")
MAX_RECIPE_BYTES: Final = 1 << 20
_COMMENT_WIDTH: Final = 118
_LINE_ENDS: Final = frozenset("\x85\u2028\u2029")
"""Characters that YAML reads as the end of a line, and writes as they are unless it writes ASCII."""

KeyPath: TypeAlias = tuple[str, ...]
"""Keys that lead to an option in a recipe, such as ("plan", "budget", "bpw")."""


@checked_dataclass(frozen=True, config=STRICT)
class Recipe:
    """The options of a conversion."""

    preset: PresetName = "mode"
    """The shipped recipe that this one builds on."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    calibration: CalibrationOptions = CalibrationOptions()
    sensitivity: SensitivityOptions = SensitivityOptions()
    plan: PlanOptions = PlanOptions()
    export: ExportOptions = ExportOptions()
    validation: ValidationOptions = ValidationOptions()
    compute: ComputeOptions = ComputeOptions()

    @classmethod
    def of(cls, *layers: "OptionLayer") -> "Recipe":
        """Options from layers that each override those before; the first preset that is named from the end is the
        base.

        Raises:
            UsageError, InputError: an unknown key, or a value that its option cannot take, as its layer raises.
        """
        for layer in layers:
            layer.check_keys()
        preset = next((layer.values["preset"] for layer in reversed(layers) if layer.values.get("preset")), "mode")
        base = [preset_layer(preset)] if preset in PRESET_NAMES else []
        merged: dict[str, Any] = {}
        for layer in (*base, *layers):
            merged = _merged(merged, layer.values)
        merged["preset"] = preset
        try:
            return _ADAPTER.validate_python(merged)
        except ValidationError as error:
            raise _explained(error, (*base, *layers)) from None

    def save(self, path: Path) -> None:
        """Write everything, with what it means, atomically."""
        write_text(path, "".join(f"{line}\n" for line in commented_lines(self)))


@dataclass(frozen=True, slots=True)
class OptionLayer:
    """Options from one source.

    Attributes:
        values: as in a recipe file, sections within each other.
        source: the file; None for a command line.
        labels: the source's names of keys, such as --bpw; others are named by their place in a recipe.
    """

    values: Mapping[str, Any]
    source: Path | None = None
    labels: Mapping[KeyPath, str] = field(default_factory=dict)

    def error(self, key: KeyPath, message: str) -> ModeGgufError:
        """The exception for a key of this layer."""
        name = self.labels.get(key) or ".".join(key)
        return (
            UsageError(f"{name}: {message}") if self.source is None else InputError(f"{self.source}: {name}: {message}")
        )

    def check_keys(self) -> None:
        """Refuse keys that are none, with the nearest one that is.

        Raises:
            UsageError, InputError: as `error`.
        """
        for key, known in _unknown_keys(self.values, Recipe()):
            nearest = difflib.get_close_matches(key[-1], known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise self.error(key, f"no such option; {hint}")


def preset_layer(name: str) -> OptionLayer:
    """The recipe of a preset."""
    return read_recipe(SHIPPED / f"{name}.yaml")


def read_recipe(path: Path) -> OptionLayer:
    """A recipe file.

    Raises:
        InputError: it cannot be read, or is no mapping in YAML.
    """
    check_regular(path, "recipe")
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(
                f"{path}: {path.stat().st_size:,} bytes, a recipe of at most {MAX_RECIPE_BYTES:,} expected"
            )
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a recipe ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: options by name expected, {type(values).__name__} found; see `mode-gguf recipe`")
    return OptionLayer(values, path)


def settings_layer(settings: Sequence[str]) -> OptionLayer:
    """Options from `section.option=value` each, with values as YAML writes them.

    Raises:
        UsageError: no `=`, or a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise UsageError(f"--set {setting}: write an option of the recipe, = and its value, such as plan.refine=2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        values = _merged(values, nested(tuple(name.split(".")), value))
    return OptionLayer(values)


def nested(key: KeyPath, value: Any) -> dict[str, Any]:
    """A value at its place: ("plan", "refine") and 2 make {"plan": {"refine": 2}}."""
    for part in reversed(key):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def commented_lines(recipe: Recipe) -> Iterator[str]:
    """The lines of a recipe file with all options, each below what it means."""
    yield "# A recipe of mode-gguf: convert MODEL --recipe FILE. What is left out is as in the preset."
    yield from _section(recipe, "")


def _section(options: Any, indent: str) -> Iterator[str]:
    described = type(options).__pydantic_fields__
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            yield ""
            doc = " ".join((type(value).__doc__ or "").split("\n\n")[0].split())
            yield from _comment(doc, indent)
            yield f"{indent}{one.name}:"
            yield from _section(value, indent + "  ")
        else:
            yield from _comment(" ".join((described[one.name].description or "").split()), indent)
            yield f"{indent}{one.name}: {yaml_scalar(value)}"


def _comment(text: str, indent: str) -> Iterator[str]:
    start = f"{indent}# "
    yield from textwrap.wrap(
        text, _COMMENT_WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )


def yaml_scalar(value: Any) -> str:
    """A value on one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    dump = partial(yaml.safe_dump, plain, default_flow_style=True, width=float("inf"))
    text: str = dump(allow_unicode=True)
    if not _LINE_ENDS.isdisjoint(text):
        text = dump(allow_unicode=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options of both; those of `above` win."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _unknown_keys(values: Mapping[str, Any], options: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, list[str]]]:
    """Keys that no option has, with those that there are at their place."""
    known = [one.name for one in fields(options)]
    for key, value in values.items():
        if key not in known:
            yield (*at, str(key)), known
        elif is_dataclass(section := getattr(options, key)) and isinstance(value, dict):
            yield from _unknown_keys(value, section, (*at, key))


def _explained(error: ValidationError, layers: Sequence[OptionLayer]) -> ModeGgufError:
    """The error of the layer whose value pydantic refused."""
    first = error.errors()[0]
    place = tuple(str(part) for part in first["loc"])
    for layer in reversed(layers):
        value: Any = layer.values
        for length, part in enumerate(place):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
            if length + 1 == len(place) or not isinstance(value, Mapping):
                message = first["msg"].removeprefix("Value error, ")
                return layer.error(place[: length + 1], f"{message}; found {first['input']!r}")
    return UsageError(f"{'.'.join(place)}: {first['msg']}")


_ADAPTER: Final = TypeAdapter(Recipe)
