"""Tensor rules: the table that leads from a checkpoint's tensors to those of a GGUF file.

Names of checkpoint tensors are those of transformers' parameters; a family's `Layout` renames them where checkpoints
store them under other ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import NoReturn, TypeAlias

from mode_gguf.architectures.tensors import ALL_ROWS, Array, Order, Reader, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

Values: TypeAlias = Mapping[str, int]
"""One value for each placeholder of a rule."""

Ranges: TypeAlias = Mapping[str, Sequence[Values]]
"""The values of a placeholder, or of a subset that rules are confined to, by its name."""


@dataclass(frozen=True, slots=True)
class View:
    """A GGUF tensor's shape in NumPy order, and what reads it; `read` and `order` as in `SourceTensor`."""

    shape: tuple[int, ...]
    read: Reader
    order: Order | None = None


Transform: TypeAlias = Callable[[Checkpoint, str], View]
"""A function from the name of a checkpoint tensor to a GGUF tensor; it reads headers alone until `read` is called."""


def as_stored(checkpoint: Checkpoint, source: str) -> View:
    """The tensor as it is."""
    return View(checkpoint.shape(source), lambda _, rows=ALL_ROWS: checkpoint.read(source, rows))


def stacked(checkpoint: Checkpoint, sources: Sequence[str]) -> View:
    """Experts that are stored one by one, (rows, n_in) each, as (E, rows, n_in).

    Raises:
        InputError: they differ in shape.
    """
    shape = checkpoint.shape(sources[0])
    for source in sources:
        if len(shape) != 2 or checkpoint.shape(source) != shape:
            refuse_shape(checkpoint, source, f"a matrix of the shape that {sources[0]} has, {list(shape)}")

    def read(expert: int, rows: slice = ALL_ROWS) -> Array:
        return checkpoint.read(sources[expert], rows)

    return View((len(sources), *shape), read)


def check_shape(checkpoint: Checkpoint, source: str, expected: Sequence[int]) -> None:
    """Refuse a tensor of another shape than its configuration makes it, with an `InputError`."""
    if checkpoint.shape(source) != tuple(expected):
        refuse_shape(checkpoint, source, f"{list(expected)} by config.json")


def refuse_shape(checkpoint: Checkpoint, source: str, expected: str) -> NoReturn:
    """Raise the `InputError` that says what shape a tensor has, and what was expected."""
    raise InputError(
        f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.shape(source))}, expected {expected}; use the "
        "configuration published with these weights"
    )


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One GGUF tensor for each value of the placeholder in its names, such as `{layer}`.

    Attributes:
        source: checkpoint name.
        name: GGUF name.
        role: what may happen to it.
        transform: how the one becomes the other.
        projection: of experts.
        activation: statistics of its input; None when it has none.
        each: checkpoint name of expert `{expert}`'s matrix, where experts may also be stored one by one.
        only: name of the subset of the ranges that it is confined to, such as the layers of one kind.
    """

    source: str
    name: str
    role: Role
    transform: Transform = as_stored
    projection: str | None = None
    activation: str | None = None
    each: str | None = None
    only: str | None = None

    @property
    def placeholder(self) -> str | None:
        """The name between braces in `source`, if there is one."""
        return placeholder_of(self.source)

    def filled(self, values: Values) -> "TensorRule":
        """The rule of one layer: placeholders replaced."""
        return replace(
            self,
            source=self.source.format_map(values),
            name=self.name.format_map(values),
            activation=self.activation and self.activation.format_map(values),
        )


def placeholder_of(name: str) -> str | None:
    """The placeholder in a name, without its braces; None where there is none."""
    return next((part for _, part, _, _ in Formatter().parse(name) if part is not None), None)


def numbered(placeholder: str, numbers: int | Iterable[int]) -> list[Values]:
    """A range: `placeholder` with each of the numbers, or with all below one."""
    return [{placeholder: number} for number in (range(numbers) if isinstance(numbers, int) else numbers)]


@dataclass(frozen=True, slots=True)
class ModuleRules:
    """Rules for the tensors of one torch module, such as a decoder layer or a vision block.

    Tensors are named from inside the module: `MODULE.weight("norm1", "ln1")`.

    Attributes:
        source: the checkpoint's name of the module.
        name: GGUF's.
        measured: whether calibration keeps statistics of what its matrices read.
    """

    source: str
    name: str
    measured: bool = False

    def keep(self, source: str, name: str, only: str | None = None, transform: Transform = as_stored) -> TensorRule:
        """A router, gate, scale or any other tensor that stays in F32, by its whole name."""
        return TensorRule(f"{self.source}.{source}", f"{self.name}.{name}", Role.KEEP, transform, only=only)

    def norm(self, source: str, name: str, only: str | None = None, transform: Transform = as_stored) -> TensorRule:
        """The weight of a norm."""
        return self.keep(f"{source}.weight", f"{name}.weight", only, transform)

    def dense(self, source: str, name: str, only: str | None = None, transform: Transform = as_stored) -> TensorRule:
        """The matrix of a linear layer."""
        name = f"{self.name}.{name}.weight"
        activation = name if self.measured else None
        return TensorRule(
            f"{self.source}.{source}.weight", name, Role.DENSE, transform, activation=activation, only=only
        )

    def linear(
        self, source: str, name: str, bias: str | None = None, transform: Transform = as_stored
    ) -> tuple[TensorRule, ...]:
        """The matrix and the bias of a linear layer.

        Args:
            bias: subset of the modules that have one; None for all.
        """
        return (
            self.dense(source, name, transform=transform),
            self.keep(f"{source}.bias", f"{name}.bias", bias, transform),
        )

    def layer_norm(self, source: str, name: str, bias: str | None = None) -> tuple[TensorRule, ...]:
        """Weight and bias of a LayerNorm; `bias` as in `linear`."""
        return self.norm(source, name), self.keep(f"{source}.bias", f"{name}.bias", bias)

    def feed_forward(self, source: str, suffix: str = "", only: str | None = None) -> tuple[TensorRule, ...]:
        """Gate, up and down of a dense feed-forward network, or of shared experts with GGUF's `suffix` for them."""
        return tuple(
            self.dense(f"{source}.{projection}_proj", f"ffn_{projection}{suffix}", only)
            for projection in ("gate", "up", "down")
        )


LAYER = ModuleRules("model.language_model.layers.{layer}", "blk.{layer}", measured=True)
"""A decoder layer."""

EMBEDDING = TensorRule("model.language_model.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING)
OUTPUT = TensorRule("lm_head.weight", "output.weight", Role.OUTPUT, activation="output.weight")


def text_rules(*layer: TensorRule, norm: Transform = as_stored) -> tuple[TensorRule, ...]:
    """Rules for the tensors of a text model: embedding, those of its layers, the last norm, and the output head."""
    last = TensorRule("model.language_model.norm.weight", "output_norm.weight", Role.KEEP, norm)
    return EMBEDDING, *layer, last, OUTPUT
