"""What a model family is: tables that lead from checkpoint tensors to GGUF tensors, and what llama.cpp must be told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from string import Formatter
from typing import Any, TypeAlias

from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage, image_token_id
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Order, Reader, Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

MetadataValue: TypeAlias = str | bool | int | float | list[str] | list[bool] | list[int] | list[float]
"""A GGUF value: int is stored as uint32, float as float32, and a list of int as an int32 array."""

Metadata: TypeAlias = Mapping[str, MetadataValue]

Values: TypeAlias = Mapping[str, int]
"""What fills the placeholders of a rule once."""

Ranges: TypeAlias = Mapping[str, Sequence[Values]]
"""All that fills them, by placeholder."""


@dataclass(frozen=True, slots=True)
class View:
    """A GGUF tensor's shape in NumPy order, and what reads it; `read` and `order` as in `SourceTensor`."""

    shape: tuple[int, ...]
    read: Reader
    order: Order | None = None


Transform: TypeAlias = Callable[[Checkpoint, str], View]
"""From the checkpoint tensor of that name to a GGUF tensor; reads nothing but headers until its `read` is called."""


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
            raise InputError(
                f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.shape(source))}, and {sources[0]} "
                f"{list(shape)}; expected experts of one layer to be matrices of one shape"
            )

    def read(expert: int, rows: slice = ALL_ROWS) -> Array:
        return checkpoint.read(sources[expert], rows)

    return View((len(sources), *shape), read)


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
        only: key of the ranges that it is confined to, such as the layers of one kind.
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

    def filled(self, values: Mapping[str, int]) -> "TensorRule":
        """The rule of one layer: placeholders replaced."""
        return replace(
            self,
            source=self.source.format_map(values),
            name=self.name.format_map(values),
            activation=self.activation and self.activation.format_map(values),
        )


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the token embedding (transformers reads the outermost setting, default False)."""
    return bool(checkpoint.config.get("tie_word_embeddings", False))


def placeholder_of(name: str) -> str | None:
    """What is between braces in `name`, if there are any."""
    return next((part for _, part, _, _ in Formatter().parse(name) if part is not None), None)


def any_checkpoint(checkpoint: Checkpoint) -> bool:
    """Of families that have their class for themselves, and of the last that shares it."""
    return True


def same_name(parameter: str) -> str:
    """Of checkpoints that name tensors as transformers names parameters."""
    return parameter


def no_parameter(checkpoint: Checkpoint, parameter: str) -> Array | None:
    """Of checkpoints that store every parameter as one tensor."""
    return None


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Everything that differs between model families.

    Attributes:
        hf_class: transformers' class, as `architectures` in config.json names it.
        gguf_arch: general.architecture of the text model.
        projector_type: clip.projector_type.
        text_rules: tensors of the text model, in file order.
        projector_rules: tensors of the projector, in file order.
        ignored: beginnings of names of checkpoint tensors that are left out on purpose; placeholders as in rules.
        matches: whether a checkpoint of the class is one of this family's, where several families share it.
        check: refuses, with `InputError`, checkpoints that llama.cpp would run differently.
        ranges: for each placeholder, the values that fill it, one mapping per repetition; also the subsets that rules
            are confined to, and `expert`.
        text_metadata: keys of the text model beyond general.* and tokenizer.*.
        projector_metadata: clip.* keys.
        tied_output: checkpoint name of the output head that a checkpoint with tied embeddings lacks.
        place_image: an image as the model takes it.
        needs_processor: whether that takes transformers' image processor.
        image_tokens: how many tokens stand for an image of some size, or at most; None where each stands for as large a
            part of any image.
        image_token: id of the token that stands for a piece of an image.
        placeholder: what the chat template writes for an image, or, where it knows only text, what is written into the
            text; None for the image token.
        token_types: argument of the model's forward that is 1 at image tokens and 0 elsewhere; None if it takes none.
        tied: whether the output head is the token embedding.
        special_tokens: llama.cpp's roles of tokens, such as `eot`, that no tokenizer file names.
        model_config: what transformers' configuration is made of.
        stored_name: from the name of a transformers parameter to the checkpoint tensor's.
        read_parameter: reads a parameter outside the decoder layers that is not one tensor as it is, by its name in
            transformers; None for those that are.
        mtp_rules: tensors of a file that drafts by multi-token prediction, without placeholders; None where there is
            no such file.
        mtp_metadata: its keys beyond general.* and tokenizer.*.
    """

    hf_class: str
    gguf_arch: str
    projector_type: str
    text_rules: tuple[TensorRule, ...]
    projector_rules: tuple[TensorRule, ...]
    ignored: tuple[str, ...]
    check: Callable[[Checkpoint], None]
    ranges: Callable[[Checkpoint], Ranges]
    text_metadata: Callable[[Checkpoint], Metadata]
    projector_metadata: Callable[[Checkpoint], Metadata]
    tied_output: str
    place_image: Callable[[ImagePlace], PlacedImage]
    needs_processor: bool = True
    image_tokens: Callable[[Checkpoint, ImageSize | None], int] | None = None
    matches: Callable[[Checkpoint], bool] = any_checkpoint
    image_token: Callable[[Checkpoint], int] = image_token_id
    placeholder: str | None = None
    token_types: str | None = "mm_token_type_ids"
    tied: Callable[[Checkpoint], bool] = is_tied
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    model_config: Callable[[Checkpoint], Mapping[str, Any]] = attrgetter("config")
    stored_name: Callable[[str], str] = same_name
    read_parameter: Callable[[Checkpoint, str], Array | None] = no_parameter
    mtp_rules: Callable[[Checkpoint], tuple[TensorRule, ...]] | None = None
    mtp_metadata: Callable[[Checkpoint], Metadata] | None = None


def source_tensors(family: ModelFamily, rules: Sequence[TensorRule], checkpoint: Checkpoint) -> list[SourceTensor]:
    """Apply `rules` to a checkpoint: one `SourceTensor` per rule and repetition.

    Layers are kept together: neighbouring rules with one placeholder are repeated as a block.

    Raises:
        InputError: a tensor is missing, or has a shape its transform cannot read.
    """
    tied = family.tied(checkpoint)
    ranges = family.ranges(checkpoint)
    tensors = []
    for rule, values in _repeated(rules, ranges):
        if tied and rule.source == family.tied_output:
            continue
        sources = _sources(rule, values, ranges, checkpoint)
        one = sources == (rule.source,)
        view = rule.transform(checkpoint, rule.source) if one else stacked(checkpoint, sources)
        tensors.append(
            SourceTensor(
                name=rule.name,
                shape=view.shape,
                role=rule.role,
                sources=sources,
                read=view.read,
                order=view.order,
                activation=rule.activation,
                layer=values.get("layer"),
                projection=rule.projection,
            )
        )
    return tensors


def left_out_beginnings(family: ModelFamily, ranges: Ranges) -> tuple[str, ...]:
    """`family.ignored` with placeholders filled."""
    return tuple(name.format_map(values) for name in family.ignored for values in _repetitions(name, ranges))


def check_all_used(family: ModelFamily, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with tensors that no rule reads: a file without them would be another model.

    Raises:
        InputError: naming the first such tensor.
    """
    ranges = family.ranges(checkpoint)
    rules = (*family.text_rules, *family.projector_rules)
    known = {
        source for rule, values in _repeated(rules, ranges) for source in _sources(rule, values, ranges, checkpoint)
    }
    ignored = left_out_beginnings(family, ranges)
    for name in checkpoint.tensors:
        if name not in known and not name.startswith(ignored):
            raise InputError(
                f"{checkpoint.path}: tensor {name} {list(checkpoint.shape(name))} has no place in a "
                f"{family.gguf_arch} GGUF file; expected the original {family.hf_class} weights"
            )


def _sources(rule: TensorRule, values: Values, ranges: Ranges, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Checkpoint tensors of a filled rule: one, or one per expert where that is how they are stored."""
    if rule.each is not None and rule.source not in checkpoint.tensors:
        each = tuple(rule.each.format_map({**values, **expert}) for expert in ranges["expert"])
        if each and each[0] in checkpoint.tensors:
            return each
    return (rule.source,)


def _repetitions(name: str, ranges: Ranges) -> Sequence[Values]:
    """What fills `name`, once for every time that it stands for something."""
    placeholder = placeholder_of(name)
    return ranges[placeholder] if placeholder else ({},)


def _repeated(rules: Sequence[TensorRule], ranges: Ranges) -> list[tuple[TensorRule, Values]]:
    filled: list[tuple[TensorRule, Values]] = []
    start = 0
    for end in range(1, len(rules) + 1):
        if end < len(rules) and rules[end].placeholder == rules[start].placeholder:
            continue
        for values in _repetitions(rules[start].source, ranges):
            filled += [
                (rule.filled(values), values)
                for rule in rules[start:end]
                if rule.only is None or values in ranges[rule.only]
            ]
        start = end
    return filled
