"""transformers' configuration of a checkpoint, whatever layout its own is in."""

from copy import deepcopy

from transformers import CONFIG_MAPPING, PreTrainedConfig

from mode_gguf.architectures import ModelFamily
from mode_gguf.architectures.hparams import Hparams
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, foreign_errors
from mode_gguf.forward.resolved_settings import check_resolved


def model_config(checkpoint: Checkpoint, family: ModelFamily) -> PreTrainedConfig:
    """The configuration that transformers builds the model from; the checkpoint's own code is never run.

    Raises:
        InputError: transformers does not know the model's type, does not take its settings, or makes something else of
            them than stands in the file.
    """
    file, settings = checkpoint.path / "config.json", family.layout.model_config(checkpoint)
    model_type = Hparams(checkpoint, file, settings).read(str, "model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"{file}: transformers has no model_type {model_type!r}")
    # A copy: transformers changes what it is given, down to the objects within.
    with foreign_errors(f"{file}: transformers takes no such configuration", "use the one published with the model"):
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(settings)))
    if checkpoint.base is None:
        check_resolved(checkpoint, family, config)
        config.tie_word_embeddings = family.layout.ties_head(checkpoint)
    return config
