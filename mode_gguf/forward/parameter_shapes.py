"""Shapes of transformers' parameters beside those of the checkpoint's tensors, without a weight being read."""

from collections import Counter

from mode_gguf.architectures import find_family
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.forward.model_config import model_config
from mode_gguf.forward.streaming import empty_model


def check_parameter_shapes(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose configuration is of another model than its tensors.

    Experts are left out, which checkpoints store in more than one way, and tensors that several parameters are read
    from: `text_tensors` and `projector_tensors` have compared them.

    Raises:
        InputError: a tensor has another shape than transformers' model of this configuration, or that cannot be made.
    """
    family = find_family(checkpoint)
    model = empty_model(checkpoint, model_config(checkpoint, family))
    parameters = [(family.layout.stored_name(name), one) for name, one in model.named_parameters()]
    together = Counter(stored for stored, _ in parameters)  # queries, keys and values in one tensor
    for stored, parameter in parameters:
        if ".experts." in stored or stored not in checkpoint.tensors or together[stored] > 1:
            continue
        if checkpoint.shape(stored) != tuple(parameter.shape):
            raise InputError(
                f"{checkpoint.path}: tensor {stored} has shape {list(checkpoint.shape(stored))}, expected "
                f"{list(parameter.shape)} by config.json; use the configuration published with these weights"
            )
