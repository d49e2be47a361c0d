"""A family's rules applied to a checkpoint: its GGUF tensors, and what no rule reads."""

from collections.abc import Sequence

from mode_gguf.architectures.family import ModelFamily
from mode_gguf.architectures.rules import EMBEDDING, Ranges, TensorRule, Values, placeholder_of, refuse_shape, stacked
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.names import other_beginnings
from mode_gguf.errors import InputError


def source_tensors(family: ModelFamily, rules: Sequence[TensorRule], checkpoint: Checkpoint) -> list[SourceTensor]:
    """Apply `rules` to a checkpoint: one `SourceTensor` per rule and repetition.

    Layers are kept together: neighbouring rules with one placeholder are repeated as a block.

    Raises:
        InputError: a tensor is missing, or has a shape its transform cannot read.
    """
    tied = family.layout.ties_head(checkpoint)
    ranges = family.ranges(checkpoint)
    tensors = []
    for rule, values in _repeated(rules, ranges):
        if tied and rule.role is Role.OUTPUT:
            continue
        sources = _sources(rule, values, ranges, checkpoint)
        if rule.role is Role.OUTPUT:
            _check_head(family, checkpoint, rule.source)
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


def _check_head(family: ModelFamily, checkpoint: Checkpoint, head: str) -> None:
    """Refuse a model without an output head, or with one of another shape than the token embedding's."""
    if head not in checkpoint.tensors:
        raise InputError(
            f"{checkpoint.path}: tensor {head} is missing from the checkpoint, and config.json does not say that "
            "embeddings are tied (tie_word_embeddings); download it again or check config.json"
        )
    embedding = family.layout.stored_name(EMBEDDING.source)
    if embedding in checkpoint.tensors:
        expected = checkpoint.shape(embedding)
        if checkpoint.shape(head) != expected:
            refuse_shape(checkpoint, head, f"that of {embedding}, {list(expected)}")


def ignored_prefixes(family: ModelFamily, ranges: Ranges) -> tuple[str, ...]:
    """`family.ignored` under the checkpoint's names, with placeholders filled."""
    names = map(family.layout.stored_name, family.ignored)
    return tuple(name.format_map(values) for name in names for values in _repetitions(name, ranges))


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
    ignored = ignored_prefixes(family, ranges)
    unknown = [name for name in checkpoint.tensors if name not in known and not name.startswith(ignored)]
    if renamed := other_beginnings(unknown, known - checkpoint.tensors.keys()):
        raise InputError(
            f"{checkpoint.path}: tensor {renamed[0]} is called {renamed[1]} in a checkpoint of {family.hf_class}; save "
            "the model again with transformers' save_pretrained, or rename the tensors so"
        )
    if unknown:
        raise InputError(
            f"{checkpoint.path}: tensor {unknown[0]} {list(checkpoint.shape(unknown[0]))} has no place in a "
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
    """Values of the placeholder in a name, once for each repetition."""
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
