"""Hyperparameters: typed access to config.json, which comes from elsewhere and may lack or mistype anything."""

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.errors import InputError

T = TypeVar("T")

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No defaults."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of routed experts."""
_LARGEST = 2**1000
"""Integers below it have a float."""
_MOST_REPEATED = 2**14
"""Layers, or experts of a layer: many times what models have."""
_AS_PUBLISHED = "use the configuration published with the model"


@dataclass(frozen=True, slots=True)
class Hparams:
    """Hyperparameters of one part of a model, by their names in config.json.

    Attributes:
        checkpoint: whose they are.
        file: where they come from.
        values: by name.
        reader: the part of llama.cpp that is told about them, such as `qwen3vlmoe`; named where one is refused.
        label: what stands ahead of their names in messages, such as "vision ".
    """

    checkpoint: Checkpoint
    file: Path
    values: Mapping[str, Any]
    reader: str = ""
    label: str = ""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name`, of whatever type; null where it is null."""
        return self.values.get(name, default)

    def has(self, name: str) -> builtins.bool:
        """Whether `name` is there and not null."""
        return self.values.get(name) is not None

    def read(self, kind: type[T], *names: str) -> T:
        """The first of `names` that is there and not null, as a `kind`.

        Raises:
            InputError: none is, or the value has another type.
        """
        name = next((name for name in names if self.has(name)), None)
        if name is None:
            raise InputError(f"{self.file}: {' or '.join(names)} ({kind.__name__}) is missing; {_AS_PUBLISHED}")
        value = self.values[name]
        if kind is builtins.float and type(value) is builtins.int and abs(value) < _LARGEST:
            value = builtins.float(value)
        if not isinstance(value, kind) or (kind is not builtins.bool and isinstance(value, builtins.bool)):
            raise InputError(f"{self.file}: {name} is {value!r}, expected {kind.__name__}; {_AS_PUBLISHED}")
        return value

    def int(self, *names: str) -> builtins.int:
        """An integer."""
        return self.read(builtins.int, *names)

    def float(self, *names: str) -> builtins.float:
        """A number; integers pass."""
        return self.read(builtins.float, *names)

    def bool(self, *names: str) -> builtins.bool:
        """True or false."""
        return self.read(builtins.bool, *names)

    def list(self, *names: str) -> builtins.list[Any]:
        """A list of anything."""
        return self.read(builtins.list, *names)

    def floats(self, name: str, count: builtins.int) -> builtins.list[builtins.float]:
        """A list of `count` numbers.

        Raises:
            InputError: there are others, or not as many.
        """
        values = self.list(name)
        if len(values) != count or any(
            type(one) not in (builtins.int, builtins.float) or abs(one) >= _LARGEST for one in values
        ):
            self.refuse(name, f"{count} numbers")
        return [builtins.float(one) for one in values]

    def section(self, *names: str, defaults: Mapping[str, Any] = NOTHING) -> "Hparams":
        """The hyperparameters of an object within these, such as `rope_parameters`."""
        return replace(self, values={**defaults, **self.read(dict, *names)})

    def expect(self, name: str, wanted: Any, why: str, *, default: Any = ...) -> None:
        """Refuse every value of `name` but the only one that llama.cpp has a place for.

        Args:
            why: what the reader does, such as "always gates with silu".
            default: transformers' value of a hyperparameter that is absent; by default the one that is wanted.

        Raises:
            InputError: there is another value.
        """
        self.require(name, self.get(name, wanted if default is ... else default), wanted, why)

    def require(self, name: str, found: Any, wanted: Any, why: str) -> None:
        """Refuse what `name` comes to in the model unless it is what is wanted; otherwise as `expect`."""
        if found != wanted:
            raise InputError(
                f"{self.file}: {self.label}{name} is {found!r}, expected {wanted!r}: llama.cpp's {self.reader} {why}; "
                "the file would not compute what the checkpoint does"
            )

    def refuse(self, name: str, expected: str, way_out: str = _AS_PUBLISHED) -> NoReturn:
        """Raise the `InputError` that says what `name` is, and what was expected."""
        raise InputError(f"{self.file}: {self.label}{name} is {self.get(name)!r}, expected {expected}; {way_out}")


def config(checkpoint: Checkpoint, defaults: Mapping[str, Any] = NOTHING, reader: str = "") -> Hparams:
    """Hyperparameters outside every section of config.json; arguments as of `text_hparams`."""
    return Hparams(checkpoint, checkpoint.path / "config.json", {**defaults, **checkpoint.config}, reader)


def text_hparams(checkpoint: Checkpoint, defaults: Mapping[str, Any] = NOTHING, reader: str = "") -> Hparams:
    """Hyperparameters of the text model: `text_config`, or `llm_config` where a model's authors have called it so.

    Args:
        defaults: transformers' values of what config.json may lack.

    Raises:
        InputError: there is no such object.
    """
    return _part(checkpoint, "llm_config" if "llm_config" in checkpoint.config else "text_config", defaults, reader)


def vision_hparams(checkpoint: Checkpoint, defaults: Mapping[str, Any] = NOTHING, reader: str = "") -> Hparams:
    """Hyperparameters of the vision tower, `vision_config`; arguments and errors as of `text_hparams`."""
    return replace(_part(checkpoint, "vision_config", defaults, reader), label="vision ")


def image_hparams(checkpoint: Checkpoint, defaults: Mapping[str, Any] = NOTHING) -> Hparams:
    """Settings of the image processor: preprocessor_config.json, or the processor_config.json of transformers 5.

    Raises:
        InputError: there is neither, or it cannot be read.
    """
    old, new = checkpoint.path / "preprocessor_config.json", checkpoint.path / "processor_config.json"
    if old.exists() or not new.exists():
        values = read_json(old)
        return Hparams(checkpoint, old, {**defaults, **values, **(values.get("media_proc_cfg") or {})})
    values = read_json(new)
    if not isinstance(values.get("image_processor"), dict):
        found = values.get("image_processor")
        raise InputError(f"{new}: expected an object image_processor, found {found!r}; download it again")
    return Hparams(checkpoint, new, {**defaults, **values["image_processor"]})


def expert_sizes(text: Hparams) -> tuple[int, int, int]:
    """The number of experts, the hidden size and the width of an expert."""
    return text.int(*EXPERT_COUNTS), text.int("hidden_size"), text.int("moe_intermediate_size")


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a configuration, or its text model's, names a number of experts."""
    text = config.get("text_config")
    settings = {**config, **text} if isinstance(text, dict) else config
    return any(settings.get(name) for name in EXPERT_COUNTS)


def _part(checkpoint: Checkpoint, name: str, defaults: Mapping[str, Any], reader: str) -> Hparams:
    file, value = checkpoint.path / "config.json", checkpoint.config.get(name)
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected an object {name}, found {value!r}")
    for key, count in value.items():
        repeated = key.endswith("num_hidden_layers") or key in (*EXPERT_COUNTS, "depth")
        if repeated and isinstance(count, int) and count > _MOST_REPEATED:  # names of tensors would fill the memory
            raise InputError(f"{file}: {key} is {count}, expected {_MOST_REPEATED:,} at most; {_AS_PUBLISHED}")
    return Hparams(checkpoint, file, {**defaults, **value}, reader)
