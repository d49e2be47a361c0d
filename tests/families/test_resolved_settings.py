"""Settings as transformers resolves them: the same as in the file, or refused before anything is measured."""

from pathlib import Path
from typing import Any

import pytest
from gguf import Keys

from mode_gguf.architectures import find_family
from mode_gguf.errors import InputError
from mode_gguf.forward.model_config import model_config
from mode_gguf.forward.resolved_settings import SETTINGS, TOWER, check_resolved, declared_names
from tests.families.cases import every_case, every_layout
from tests.families.changed import changed
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.test_long_context import BY_NAME, text_section

SIZES = {"block_count", "context_length", "embedding_length", "expert_count", "attention.layer_norm_rms_epsilon"}


@every_layout
def test_published_settings_are_the_same(case: FamilyCase, layout: str, families: Families) -> None:
    checkpoint = families.checkpoint(layout)
    family = find_family(checkpoint)
    config = model_config(checkpoint, family)
    written = family.text_metadata(checkpoint)
    compared = {
        key.removeprefix("{arch}.")
        for key, names in SETTINGS.items()
        if key.format(arch=family.gguf_arch) in written and declared_names(config.text_config, names)
    }
    assert compared > SIZES


@every_layout
def test_heads_of_the_tower_are_compared(case: FamilyCase, layout: str, families: Families) -> None:
    """No shape shows their number."""
    checkpoint = families.checkpoint(layout)
    family = find_family(checkpoint)
    config = model_config(checkpoint, family)
    (name,) = declared_names(config.vision_config, TOWER[Keys.ClipVision.Attention.HEAD_COUNT])
    setattr(config.vision_config, name, 3)
    with pytest.raises(InputError, match=rf"vision {name} would be \d+ in the file, and transformers makes it 3"):
        check_resolved(checkpoint, family, config)


def refusal(case: FamilyCase, families: Families, folder: Path, **settings: Any) -> str:
    checkpoint = families.checkpoint(case.layouts[0])
    other = changed(checkpoint.path, folder, text_section(checkpoint), **settings)
    with pytest.raises(InputError) as caught:
        model_config(other, find_family(other))
    return str(caught.value)


@every_case
@pytest.mark.parametrize(("name", "value"), [("hidden_size", "256"), ("rms_norm_eps", "small"), ("rope_scaling", 4.0)])
def test_another_type_is_refused(case: FamilyCase, name: str, value: Any, families: Families, tmp_path: Path) -> None:
    said = refusal(case, families, tmp_path / "other", **{name: value})
    assert name in said
    assert repr(value) in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("qwen3-vl", {"num_local_experts": 5}, "num_experts would be 4 in the file, and transformers makes it 5"),
        ("qwen3.5", {"top_k_experts": 1}, "num_experts_per_tok would be 1 in the file, and transformers makes it 2"),
    ],
)
def test_second_names_are_refused(
    name: str, settings: dict[str, Any], says: str, families: Families, tmp_path: Path
) -> None:
    assert says in refusal(BY_NAME[name], families, tmp_path / "other", **settings)


def test_names_that_the_model_does_not_have_count_for_nothing(families: Families, tmp_path: Path) -> None:
    """As in transformers."""
    gemma = families.checkpoint("pico_gemma4")
    other = changed(gemma.path, tmp_path / "other", "text_config", num_experts_per_tok=1)
    assert find_family(other).text_metadata(other) == find_family(gemma).text_metadata(gemma)
    model_config(other, find_family(other))
