"""What llama.cpp would run differently, or cannot hold, is refused by name."""

from pathlib import Path

import pytest

from mode_gguf.architectures import text_tensors
from mode_gguf.errors import InputError
from tests.families.cases import each_of, every_layout
from tests.families.changed import changed
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.refusal import Refusal

N_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@each_of("refusals", "refusal")
def test_refused(case: FamilyCase, refusal: Refusal, families: Families, tmp_path: Path) -> None:
    folder = families.checkpoint(refusal.layout or case.layouts[0]).path
    with pytest.raises(InputError, match=refusal.says):
        refusal.by(changed(folder, tmp_path / "other", refusal.section, **refusal.settings))


@every_layout
@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_experts(
    case: FamilyCase, layout: str, more: int, families: Families, tmp_path: Path
) -> None:
    """The first tensor too few or too many, or all in one of another shape."""
    stored, said = case.pico.EXPERTS, case.pico.EXPERTS + more
    checkpoint = families.checkpoint(layout)
    section = next(name for name in ("text_config", "llm_config") if name in checkpoint.config)
    (setting,) = set(N_EXPERTS) & set(checkpoint.config[section])
    other = changed(checkpoint.path, tmp_path / "other", section, **{setting: said})
    one = rf"{stored}\.gate_proj\.weight is missing" if more > 0 else rf"{said}\.gate_proj\.weight .* has no place"
    with pytest.raises(InputError, match=rf"experts\.({one}|gate_up_proj has shape \[{stored}, .*expected \[{said}, )"):
        text_tensors(other)
