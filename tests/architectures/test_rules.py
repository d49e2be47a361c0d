"""Rules of a module's tensors, the names a layout gives them, and who computes with which tokenizer."""

import pytest

from mode_gguf.architectures import FAMILIES, TOKENIZERS
from mode_gguf.architectures.experts import expert_rules
from mode_gguf.architectures.family import SAVED, Layout, ModelFamily
from mode_gguf.architectures.rules import EMBEDDING, LAYER, OUTPUT, ModuleRules, numbered
from mode_gguf.architectures.tensors import Role

BLOCK = ModuleRules("model.tower.blocks.{block}", "v.blk.{block}")


def test_a_linear_layer_has_statistics_in_the_text_model_alone() -> None:
    dense, bias = LAYER.linear("self_attn.q_proj", "attn_q", "biased")
    assert (dense.role, dense.activation, dense.only) == (Role.DENSE, "blk.{layer}.attn_q.weight", None)
    assert (bias.role, bias.name, bias.only) == (Role.KEEP, "blk.{layer}.attn_q.bias", "biased")
    assert BLOCK.dense("fc1", "ffn_up").activation is None


def test_a_feed_forward_network_is_three_matrices() -> None:
    rules = LAYER.feed_forward("mlp.shared_experts", "_shexp", "sparse")
    assert [rule.name for rule in rules] == [
        f"blk.{{layer}}.ffn_{part}_shexp.weight" for part in ("gate", "up", "down")
    ]
    assert [rule.source.rpartition("shared_experts.")[2] for rule in rules] == [
        f"{part}_proj.weight" for part in ("gate", "up", "down")
    ]
    assert {rule.only for rule in rules} == {"sparse"}


def test_a_layout_renames_rules_and_parameters_alike() -> None:
    layout = Layout(SAVED)
    assert layout.renamed(EMBEDDING).source == "language_model.model.embed_tokens.weight"
    assert layout.renamed(OUTPUT).source == "language_model.lm_head.weight"
    assert layout.stored_name("model.vision_tower.x.weight") == "vision_tower.x.weight"
    gate = layout.renamed(expert_rules()[0])
    assert gate.source == "language_model.model.layers.{layer}.mlp.experts.gate_up_proj"
    assert gate.each == "language_model.model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"


def test_renames_follow_one_another() -> None:
    layout = Layout((*SAVED, (r"^tower\.", "vision."), (r"\.norm1\.", ".ln.")))
    assert layout.stored_name("model.tower.0.norm1.weight") == "vision.0.ln.weight"


def test_ranges_by_number_or_by_choice() -> None:
    assert numbered("layer", 2) == [{"layer": 0}, {"layer": 1}]
    assert numbered("layer", [3, 1]) == [{"layer": 3}, {"layer": 1}]


def test_tokenizers_are_told_apart() -> None:
    assert len({tokenizer.pre_tokenizer for tokenizer in TOKENIZERS}) == len(TOKENIZERS)
    assert len({(tokenizer.split, tokenizer.normalizer) for tokenizer in TOKENIZERS}) == len(TOKENIZERS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.hf_class)
def test_subsets_and_placeholders_have_no_name_in_common(family: ModelFamily) -> None:
    """A rule's subset may not be filled by accident by what another part of the family calls so."""
    of_text = {rule.only for rule in family.text.rules} - {None}
    of_vision = {rule.only for rule in family.vision.rules} - {None}
    placeholders = {rule.placeholder for rule in (*family.text.rules, *family.vision.rules)} - {None}
    assert not of_text & of_vision
    assert not (of_text | of_vision) & placeholders
