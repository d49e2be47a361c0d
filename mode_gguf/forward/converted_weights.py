"""A checkpoint's weights under transformers' names, through transformers' own conversion of hub layouts."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from mode_gguf.architectures.tensors import Array
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError


@dataclass(frozen=True, slots=True)
class ConvertedWeights:
    """Sources of each parameter and buffer of a model in its checkpoint; make one with `ConvertedWeights.of`.

    Attributes:
        sources: per name of a parameter, checkpoint tensors in the order that its conversion takes them, each with the
            pattern of the conversion that it matched, None for a tensor as it is.
        converters: by pattern.
        shared: per parameter that a conversion makes together with others, the name that `sources` knows it by.
    """

    checkpoint: Checkpoint
    model: nn.Module
    sources: Mapping[str, Sequence[tuple[str, str | None]]]
    converters: Mapping[str, Any]
    shared: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> "ConvertedWeights":
        """Resolve sources by transformers' conversion mapping; no weight is read."""
        mapping = get_model_conversion_mapping(model)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        wanted = model.state_dict()
        prefix = model.base_model_prefix
        sources: dict[str, list[tuple[str, str | None]]] = {}
        shared: dict[str, str] = {}
        for source in sorted(checkpoint.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
            if name not in wanted and source in wanted:
                name, pattern = source, None
            if name not in wanted:
                continue
            sources.setdefault(name, []).append((source, pattern))
            if pattern is not None:
                first, *others = by_pattern[pattern].target_patterns
                shared |= {name.replace(first, other): name for other in others}
        return cls(checkpoint, model, sources, by_pattern, shared)

    def __contains__(self, name: str) -> bool:
        return name in self.sources or name in self.shared

    def stored_alone(self) -> dict[str, str]:
        """Parameters that are one unchanged checkpoint tensor, by its name."""
        return {parts[0][0]: name for name, parts in self.sources.items() if len(parts) == 1 and parts[0][1] is None}

    def untie_other_head(self) -> None:
        """Give the output head a parameter of its own where another one than the embedding is stored, as transformers
        does when it loads a model whose configuration ties them."""
        model: Any = self.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight is not embedding.weight:
            return
        names = {module: f"{name}.weight" for name, module in model.named_modules() if module in (head, embedding)}
        if names[head] in self and not torch.equal(self.read(names[head]), self.read(names[embedding])):
            head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False

    def read(self, name: str) -> torch.Tensor:
        """A parameter on the CPU in the checkpoint's type.

        Raises:
            InputError: the checkpoint has nothing for it, or what it has cannot be converted.
        """
        key = self.shared.get(name, name)
        if key not in self.sources:
            raise InputError(
                f"{self.checkpoint.path}: no tensor for transformers' parameter {name}; use the checkpoint as it was "
                "published, or give llama-imatrix's file with --calibration-from"
            )
        parts = self.sources[key]
        source, pattern = parts[0]
        if pattern is None:
            return as_tensor(self.checkpoint.read(source))
        converter = deepcopy(self.converters[pattern])
        for source, matched in parts:
            converter.add_tensor(key, source, matched, as_tensor(self.checkpoint.read(source)))
        try:
            found = converter.convert(key, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise InputError(f"{self.checkpoint.path}: {source} cannot be converted to {name} ({error})") from error
        if name not in found:
            raise InputError(f"{self.checkpoint.path}: {source} is not converted to {name}, but to {', '.join(found)}")
        value = found[name]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor


def as_tensor(array: Array) -> torch.Tensor:
    """`array` as a CPU tensor of the type it stands for; bfloat16 when it is uint16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
