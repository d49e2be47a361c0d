"""Which parameter of transformers' model a checkpoint tensor is."""

from collections import Counter
from collections.abc import Iterable

from mode_gguf.architectures import find_family
from mode_gguf.checkpoint.folder import Checkpoint


def parameters_by_source(checkpoint: Checkpoint, state: Iterable[str]) -> dict[str, str]:
    """transformers' parameters that are one tensor of the checkpoint, by its name."""
    family = find_family(checkpoint)
    sources = {parameter: family.layout.stored_name(parameter) for parameter in state}
    parts = Counter(sources.values())
    return {source: parameter for parameter, source in sources.items() if parts[source] == 1}
