"""What only GLM-4.5V has: a block for multi-token prediction, groups of experts, tokens that no file names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from gguf.constants import TokenType

from mode_gguf.architectures import find_family, ignored_tensors, text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import read_vocabulary
from mode_gguf.forward.inputs import InputBuilder
from tests.e2e.conftest import settings
from tests.families.case.glm4v import GLM4V
from tests.families.changed import changed
from tests.families.conftest import Families, exact, exported
from tests.families.pico.glm4v_moe import LAYERS, PATCH, token_id, write_pico_glm4v_moe
from tests.families.pico.tokenizer import VOCAB
from tests.families.prompts import TEXT, Reference
from tests.families.test_logits import text_scores

SAMPLES = ("--image-samples", "2", "--text-samples", "1")


def test_block_for_multi_token_prediction_is_left_out(pico_glm4v: Path, pico_glm4v_fused: Path, tmp_path: Path) -> None:
    block = ignored_tensors(Checkpoint.open(pico_glm4v))
    assert len(block) == 3
    assert all(name.startswith(f"model.language_model.layers.{LAYERS}.") for name in block)
    assert not ignored_tensors(Checkpoint.open(pico_glm4v_fused))
    # A layer too many that is no such block is not left out.
    fewer = changed(pico_glm4v_fused, tmp_path / "fewer", "text_config", num_hidden_layers=LAYERS - 1)
    with pytest.raises(InputError, match=rf"layers\.{LAYERS - 1}\.\S+ .* has no place"):
        text_tensors(fewer)


def test_special_tokens(pico_glm4v: Path, families: Families) -> None:
    assert read_vocabulary(pico_glm4v, VOCAB).token_types[token_id("[gMASK]")] is TokenType.CONTROL
    fields = GGUFReader(families.files(GLM4V)[0]).fields
    for role, token in {
        "bos": "[gMASK]",
        "eos": "<|endoftext|>",
        "eot": "<|user|>",
        "eom": "<|observation|>",
        "unknown": "<|endoftext|>",
        "padding": "<|endoftext|>",
    }.items():
        assert fields[f"tokenizer.ggml.{role}_token_id"].contents() == token_id(token), role


def test_a_vocabulary_without_the_tokens(pico_glm4v: Path, tmp_path: Path) -> None:
    checkpoint = changed(pico_glm4v, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = checkpoint.path / name
        path.write_text(path.read_text().replace("[gMASK]", "[MASK]"))
    with pytest.raises(InputError, match=r"token \[gMASK\] is missing, expected it as bos"):
        exported(checkpoint, tmp_path)


@pytest.mark.parametrize("section", [None, "text_config"])
def test_tied_embeddings_in_either_section(section: str | None, tmp_path: Path) -> None:
    folder = write_pico_glm4v_moe(tmp_path / "tied", tied=True)
    checkpoint = changed(folder, tmp_path / "other", tie_word_embeddings=None)
    assert not find_family(checkpoint).layout.tied(checkpoint)
    tied = changed(checkpoint.path, tmp_path / "again", section, tie_word_embeddings=True)
    assert "output.weight" not in {tensor.name for tensor in text_tensors(tied)}


def test_images_are_scaled_down_to_their_area(families: Families) -> None:
    """The image processor counts the pixels of two frames."""
    limit = 13 * (2 * PATCH) ** 2
    builder = InputBuilder.open(families.checkpoint("pico_glm4v"), max_image_pixels=limit)
    assert int(builder.build(families.samples[2]).is_vision.sum()) == 12, "4 x 3 of 5 x 3"


@pytest.mark.parametrize(
    "settings", [{"n_group": 3, "topk_group": 2}, {"attention_bias": False, "first_k_dense_replace": 0}]
)
def test_other_settings_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_pico_glm4v_moe(tmp_path / "other", **settings))
    reference = Reference(GLM4V, checkpoint, checkpoint, GLM4V.load(checkpoint.path, checkpoint))
    with exact(*exported(checkpoint, tmp_path)) as model:
        assert text_scores(reference, model, reference.tokens(TEXT * 2)).kl.max() < GLM4V.text_kl


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(
    pico_glm4v: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    options = (*settings("sensitivity.types=Q3_K,Q4_K"), "--bpw", "2.0", "--out", tmp_path, *SAMPLES)
    error = run("convert", pico_glm4v, *options, code=3)
    assert "--bpw 2 cannot be reached" in error
    assert re.search(r"rows of 352 in 3 tensors .*do not fit Q3_K, Q4_K", error)
    assert re.search(r"rows of 480 in 1 tensors .*do not fit", error)
    assert not list(tmp_path.glob("calibration*"))


def test_fit_is_refused_by_name(pico_glm4v: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    options = ("--fit", "1GiB", "--ctx", "2048", "--out", tmp_path, *SAMPLES)
    assert "--fit is not known for glm4moe yet" in run("convert", pico_glm4v, *options, code=2)
