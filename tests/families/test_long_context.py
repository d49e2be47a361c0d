"""Positions beyond the trained context: every scaling that llama.cpp runs for a family, against transformers."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode_gguf.architectures import find_family
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.checkpoint.folder import Checkpoint
from tests.families.cases import CASES, every_case
from tests.families.changed import changed
from tests.families.conftest import Families, exact, exported
from tests.families.family_case import FamilyCase
from tests.families.prompts import TEXT, Reference, waves
from tests.families.test_logits import image_scores, text_scores

TRAINED = 64
"""Positions, of the 180 and more that are compared."""

BY_NAME = {case.name: case for case in CASES}

LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
OLD_YARN = {"type": "yarn", "factor": 4.0}
"""The older spelling; the trained context is beside it."""
WEIGHTED = {**YARN, "attention_factor": 1.3, "beta_fast": None, "beta_slow": 0}
WITHOUT_MSCALE = {**YARN, "mscale": None, "mscale_all_dim": None}
TWO_MSCALES = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
ONLY_MSCALE_ALL = {**YARN, "mscale": None, "mscale_all_dim": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
    "rope_theta": 1e4,
}

SCALED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "qwen3-vl": {"linear": LINEAR, "yarn": YARN, "old yarn": OLD_YARN, "weighted": WEIGHTED},
    "qwen3.5": {"linear": LINEAR, "yarn": YARN, "old yarn": OLD_YARN, "weighted": WEIGHTED},
    "glm4.5v": {"linear": LINEAR, "yarn": YARN, "old yarn": OLD_YARN, "weighted": WEIGHTED},
    "internvl": {"linear": LINEAR, "yarn": YARN, "old yarn": OLD_YARN, "weighted": WEIGHTED},
    "kimi-vl": {"linear": LINEAR, "yarn": WITHOUT_MSCALE, "two": TWO_MSCALES, "all": ONLY_MSCALE_ALL, "w": WEIGHTED},
    "kimi-k2.5": {"old yarn": OLD_YARN, "two mscales": TWO_MSCALES},
    "mistral4": {"linear": LINEAR, "yarn": WITHOUT_MSCALE, "two": TWO_MSCALES, "weighted": WEIGHTED},
    "gemma4": {"linear": LINEAR, "llama3": LLAMA3, "proportional": {"rope_type": "proportional", "factor": 4.0}},
}
"""By family and name, what is in the rotary settings beside the pico checkpoint's own."""


def text_section(checkpoint: Checkpoint) -> str:
    return next(name for name in ("llm_config", "text_config") if name in checkpoint.config)


def scaled(checkpoint: Checkpoint, folder: Path, scaling: Mapping[str, Any]) -> Checkpoint:
    """A copy with other rotary settings, where its own are."""
    section = text_section(checkpoint)
    text = checkpoint.config[section]
    name = "rope_parameters" if "rope_parameters" in text else "rope_scaling"
    own = text.get(name) or {}
    if "full_attention" in own:
        full = {"rope_theta": own["full_attention"]["rope_theta"], **scaling}
        return changed(checkpoint.path, folder, section, **{name: {**own, "full_attention": full}})
    own = {key: value for key, value in own.items() if not ("type" in scaling and key == "rope_type")}
    if "type" in scaling:
        own.pop("original_max_position_embeddings", None)
        return changed(
            checkpoint.path, folder, section, **{name: {**own, **scaling}, "original_max_position_embeddings": TRAINED}
        )
    return changed(checkpoint.path, folder, section, **{name: {**own, **scaling}})


def reference_of(case: FamilyCase, families: Families, folder: Path, scaling: Mapping[str, Any]) -> Reference:
    """transformers' side of the case with other rotary settings."""
    checkpoint = opened = scaled(families.checkpoint(case.layouts[0]), folder / "scaled", scaling)
    if case.transformers_layout:
        opened = scaled(families.checkpoint(case.transformers_layout), folder / "opened", scaling)
    return Reference(case, checkpoint, opened, case.load(opened.path, checkpoint))


@pytest.mark.parametrize(
    ("case", "scaling"),
    [
        pytest.param(BY_NAME[name], scaling, id=f"{name}-{kind.replace(' ', '-')}")
        for name, kinds in SCALED.items()
        for kind, scaling in kinds.items()
    ],
)
def test_logits_beyond_the_trained_context(
    case: FamilyCase, scaling: Mapping[str, Any], families: Families, tmp_path: Path
) -> None:
    reference = reference_of(case, families, tmp_path, scaling)
    with exact(*exported(reference.checkpoint, tmp_path)) as model:
        tokens = [*model.beginning, *reference.tokens(TEXT * 6)]
        assert len(tokens) > 2.5 * TRAINED
        scores = text_scores(reference, model, tokens)
        without = text_scores(families.reference(case), model, tokens)
    assert scores.kl.max() < 1e-6
    assert without.kl.mean() > 1e-3


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen3.5", "glm4.5v", "internvl", "kimi-vl"])
def test_dynamic_scaling_begins_where_the_file_ends(name: str, families: Families, tmp_path: Path) -> None:
    """Before that, transformers computes the same without it."""
    case, plain = BY_NAME[name], families.reference(BY_NAME[name])
    dynamic = reference_of(case, families, tmp_path, {"rope_type": "dynamic", "factor": 4.0})
    before, after = (find_family(one.checkpoint).text_metadata(one.checkpoint) for one in (plain, dynamic))
    assert before == after
    tokens, context = plain.tokens(TEXT), after[f"{case.gguf_arch}.context_length"]
    assert isinstance(context, int)
    assert len(tokens) < context
    np.testing.assert_array_equal(dynamic.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("case", [BY_NAME["qwen3-vl"], BY_NAME["glm4.5v"]], ids=lambda case: case.name)
def test_answers_about_a_picture(case: FamilyCase, families: Families, tmp_path: Path) -> None:
    """Positions in three directions, in sections one after the other and in turns; transformers rounds as ggml does."""
    checkpoint = scaled(
        families.checkpoint(case.layouts[0]), tmp_path / "scaled", {**YARN, "original_max_position_embeddings": 16}
    )
    transformers_model = case.load(checkpoint.path, checkpoint)
    assert case.rounded is not None
    case.rounded(transformers_model)
    reference = Reference(case, checkpoint, checkpoint, transformers_model)
    with exact(*exported(checkpoint, tmp_path)) as model:
        scores = image_scores(case, reference, model, waves(case.pictures[0]), half_pixels=True)
    print(f"KL {scores.kl.mean():.3g}")
    assert scores.kl.mean() < 1e-7


@every_case
def test_configuration_stays_as_it_is(case: FamilyCase, families: Families, tmp_path: Path) -> None:
    """transformers changes the objects it is given, and what is read afterwards would be another model."""
    scaling = next(iter(SCALED[case.name].values()))
    checkpoint = scaled(families.checkpoint(case.layouts[0]), tmp_path / "scaled", scaling)
    before = deepcopy(checkpoint.config)
    family = find_family(checkpoint)
    keys = family.text_metadata(checkpoint)
    calibrate(checkpoint, families.samples[:1], device="cpu")
    exported(checkpoint, tmp_path)
    assert checkpoint.config == before
    assert family.text_metadata(checkpoint) == keys
