"""Shapes of parameters and tensors, of every family's layouts."""

import json
import shutil
from pathlib import Path

import pytest

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.forward.parameter_shapes import check_parameter_shapes
from tests.families.cases import every_layout
from tests.families.family_case import FamilyCase


@every_layout
def test_every_layout_has_the_shapes_of_its_model(
    case: FamilyCase, layout: str, request: pytest.FixtureRequest
) -> None:
    check_parameter_shapes(Checkpoint.open(request.getfixturevalue(layout)))


def test_another_models_configuration(pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"k_proj\.weight has shape .*by config\.json"):
        check_parameter_shapes(Checkpoint.open(folder))
