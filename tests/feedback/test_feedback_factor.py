from dataclasses import replace

import numpy as np

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.feedback.feedback_factor import COST_FACTOR, with_feedback_factor


def test_only_what_has_feedback_gets_cheaper(checkpoint: Checkpoint) -> None:
    tensors = {tensor.role: tensor for tensor in text_tensors(checkpoint)}
    types = ["Q2_K", "Q8_0"]
    names = {role: tensor.name for role, tensor in tensors.items()}
    expert = tensors[Role.EXPERT]
    arrays = {f"{name}.unit": np.ones((2, 3, 2)) for name in names.values()}
    arrays |= {
        f"blk.{expert.layer}.ffn_exps.expert": np.ones((2, 3, 4, 2)),
        f"{expert.name}.weight_error": np.ones((4, 2)),
    }
    costs = with_feedback_factor(arrays, list(tensors.values()), types, types)
    assert set(costs) == set(arrays)
    for role in (Role.EXPERT, Role.DENSE):
        assert (costs[f"{names[role]}.unit"] == [COST_FACTOR, 1.0]).all()
    assert (costs[f"{names[Role.EMBEDDING]}.unit"] == 1).all()
    assert (costs[f"blk.{expert.layer}.ffn_exps.expert"] == [COST_FACTOR, 1.0]).all()
    assert (costs[f"{expert.name}.weight_error"] == 1).all()


def test_what_stands_in_counts_as_what_it_is(checkpoint: Checkpoint) -> None:
    """Down takes IQ4_NL, which has feedback, and Q8_0, which has none; together experts get the mean of the two."""
    experts = [t for t in text_tensors(checkpoint) if t.role is Role.EXPERT and t.layer == 0]
    odd = [replace(t, shape=(*t.shape[:2], 96)) if t.projection == "down" else t for t in experts]
    (down,) = (t for t in odd if t.projection == "down")
    types = ["Q2_K", "Q8_0"]
    arrays = {f"{down.name}.unit": np.ones((2, 3, 2)), "blk.0.ffn_exps.expert": np.ones((2, 3, 4, 2))}
    costs = with_feedback_factor(arrays, odd, types, types)
    assert (costs[f"{down.name}.unit"] == [COST_FACTOR, 1.0]).all()
    np.testing.assert_allclose(costs["blk.0.ffn_exps.expert"][0, 0, 0], [COST_FACTOR, 1.0])
