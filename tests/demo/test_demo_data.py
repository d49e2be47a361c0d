"""What ships in demo/: a checkpoint like the public ones, and two sets that share nothing."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from mode_gguf.allocation.budget import Budget, check_reachable
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.samples import load_samples
from mode_gguf.validation.questions import load_held_out

DEMO = Path(__file__).parents[2] / "demo"
CHECKPOINT = DEMO / "Demo-VL-MoE"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(CHECKPOINT)


def test_checkpoint_is_stored_like_the_public_ones(checkpoint: Checkpoint) -> None:
    text = checkpoint.config["text_config"]
    hidden, width, experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    assert checkpoint.shape("model.language_model.layers.0.mlp.experts.gate_up_proj") == (experts, hidden, 2 * width)
    assert checkpoint.shape("model.language_model.layers.0.mlp.experts.down_proj") == (experts, width, hidden)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert len(list(CHECKPOINT.glob("model-*.safetensors"))) >= 2
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 40_000_000


def test_experts_hold_most_weights_and_three_bits_are_within_reach(checkpoint: Checkpoint) -> None:
    tensors = text_tensors(checkpoint)
    in_experts = sum(tensor.n_weights for tensor in tensors if tensor.role is Role.EXPERT)
    assert in_experts >= 0.85 * sum(tensor.n_weights for tensor in tensors)
    assert check_reachable(tensors, DEFAULT_TYPES, Budget(value=3.0)).lowest_bpw < 3.0


def test_calibration_and_held_out_sets_share_nothing() -> None:
    held_out, calibration = load_held_out(DEMO / "heldout"), load_samples(str(DEMO / "calibration"))
    pictures = {sha256(question.image.read_bytes()).digest() for question in held_out.questions}
    shown = {sha256(path.read_bytes()).digest() for path in (DEMO / "calibration" / "images").glob("*.png")}
    assert len(pictures) == len(held_out.questions) >= 100
    assert len(shown) >= 64
    assert not pictures & shown
    texts = {sample.text for sample in calibration if sample.text}
    assert len(texts) >= 64
    assert not texts & set(held_out.texts)


def test_the_evaluation_on_file_meets_its_bounds() -> None:
    """Written by `train_demo_model.py --evaluate`; README and CHANGELOG rest on it."""
    result = json.loads((DEMO / "evaluation.json").read_text(encoding="utf-8"))
    assert result["text_kl_q2_k"] >= 0.05
    assert result["image_kl_q2_k"] >= 0.02
    assert result["image_accuracy"]["bf16"]["all"] >= 0.8
    assert result["routing_cosine_mean"] < 0.7
    assert result["vision_to_text_tokens_min"] >= 5
