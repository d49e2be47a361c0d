"""The calibrated pico model of the importance tests, and what rounding starts from."""

import numpy as np
import pytest

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.forward.inputs import ModelInputs, model_inputs
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from tests.importance.conftest import checkpoint, importance, samples, statistics

__all__ = ["checkpoint", "importance", "samples", "statistics"]


@pytest.fixture(scope="session")
def inputs(checkpoint: Checkpoint, samples: list[Sample]) -> list[ModelInputs]:
    return model_inputs(checkpoint, samples)


@pytest.fixture(scope="session")
def types(checkpoint: Checkpoint) -> dict[str, QuantType]:
    """Every K-quant once or more, and one tensor that has no feedback."""
    names = {"gate": "Q2_K", "up": "Q3_K", "down": "Q4_K"}
    found = {}
    for tensor in text_tensors(checkpoint):
        if tensor.role is Role.KEEP:
            continue
        name = names[tensor.projection] if tensor.projection else "Q5_K"
        if tensor.role is Role.OUTPUT:
            name = "Q6_K"
        if "attn_q" in tensor.name:
            name = "Q8_0"
        found[tensor.name] = QUANT_TYPES[name]
    return found


@pytest.fixture(scope="session")
def token_weights(checkpoint: Checkpoint, inputs: list[ModelInputs]) -> dict[str, np.ndarray]:
    """Made up, but different for every token and matrix; all scored positions and others count."""
    n_tokens = sum(len(one.input_ids) for one in inputs)
    generator = np.random.default_rng(4)
    names = [tensor.name for tensor in text_tensors(checkpoint) if tensor.role in (Role.DENSE, Role.OUTPUT)]
    layers = {tensor.layer for tensor in text_tensors(checkpoint) if tensor.role is Role.EXPERT}
    return {name: generator.random(n_tokens, np.float32) for name in [*names, *(f"blk.{i}.ffn_exps" for i in layers)]}
