from pathlib import Path
from typing import Any

import pytest

from mode_gguf.architectures import FAMILIES, find_family
from mode_gguf.errors import InputError
from tests.architectures.test_hparams import checkpoint_of


@pytest.mark.parametrize("config", [{}, {"architectures": ["LlamaForCausalLM"]}, {"text_config": {"num_experts": 0}}])
def test_dense_models_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not a Mixture-of-Experts"):
        find_family(checkpoint_of(tmp_path, **config))


def test_unknown_families_are_refused_with_a_list(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, architectures=["NewMoe"], text_config={"num_experts": 8})
    with pytest.raises(InputError, match=r"NewMoe.*not supported; supported are Qwen3VLMoe"):
        find_family(checkpoint)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.hf_class)
def test_rules_name_each_gguf_tensor_once(family: Any) -> None:
    names = [rule.name for rule in (*family.text_rules, *family.projector_rules)]
    assert len(names) == len(set(names))
