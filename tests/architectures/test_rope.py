"""Rotary settings as transformers puts them together: spellings, places, contradictions."""

import logging
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mode_gguf.architectures.hparams import Hparams
from mode_gguf.architectures.rope import amplitude, check_rope, latent_scaling_keys, rope_hparams, scaling_keys
from mode_gguf.errors import InputError
from tests.architectures.test_hparams import text_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
OLD_YARN = {"type": "yarn", "factor": 4.0}
SPELLINGS: dict[str, dict[str, Any]] = {
    "new": {"rope_parameters": {**YARN, "rope_theta": 5.0}},
    "old": {"rope_theta": 5.0, "rope_scaling": {**OLD_YARN, "original_max_position_embeddings": 512}},
    "trained context beside": {
        "rope_theta": 5.0,
        "original_max_position_embeddings": 512,
        "rope_scaling": {**OLD_YARN, "original_max_position_embeddings": 64},
    },
    "trained context by default": {"rope_theta": 5.0, "max_position_embeddings": 512, "rope_scaling": OLD_YARN},
    "factor by the contexts": {"rope_theta": 5.0, "rope_scaling": {**YARN, "factor": None}},
    "both kinds": {"rope_theta": 5.0, "rope_scaling": {**YARN, "type": "linear"}},
    "both objects": {"rope_scaling": {**YARN, "rope_theta": 5.0}, "rope_parameters": {"rope_type": "default"}},
    "theta twice": {"rope_theta": 7.0, "rope_parameters": {**YARN, "rope_theta": 5.0}},
    "an empty object": {"rope_theta": 5.0, "rope_scaling": {}, "rope_parameters": YARN},
    "theta by default": {"rope_parameters": YARN},
    "other lengths": {"rope_theta": 5.0, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "a length of its own": {"rope_theta": 5.0, "rope_scaling": {**YARN, "attention_factor": 1.25}},
}


def rope_of(folder: Path, **settings: Any) -> tuple[Hparams, Hparams]:
    text = text_of(folder, **{"max_position_embeddings": 2048, **settings})
    return text, rope_hparams(text, {"rope_theta": 10_000.0})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SPELLINGS.values(), ids=SPELLINGS)
def test_settings_are_those_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"max_position_embeddings": 2048, **settings}
    text, rope = rope_of(tmp_path, **settings)
    config = Qwen3MoeConfig.from_dict(deepcopy(settings))
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, None)  # which puts the trained context in its place
    expected = config.rope_parameters
    for name in ("rope_type", "rope_theta", "original_max_position_embeddings"):
        assert rope.get(name) == expected[name], name
    contexts = settings["max_position_embeddings"] / expected["original_max_position_embeddings"]
    assert rope.float("factor") == (expected["factor"] or contexts)
    assert amplitude(rope) == pytest.approx(factor)
    check_rope(text, rope)


def test_keys_of_yarn(tmp_path: Path) -> None:
    _, rope = rope_of(tmp_path, rope_parameters=YARN)
    assert {key.removeprefix("{arch}.rope.scaling."): value for key, value in scaling_keys(rope).items()} == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 512,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_no_keys_without_scaling_in_the_context(tmp_path: Path, kind: str) -> None:
    _, rope = rope_of(tmp_path, rope_parameters={"rope_type": kind, "factor": 4.0})
    assert scaling_keys(rope) == latent_scaling_keys(rope) == {}


def test_none_are_the_defaults(tmp_path: Path) -> None:
    rope = rope_hparams(text_of(tmp_path, rope_scaling=None), {"rope_theta": 7.0})
    assert rope.values == {"rope_type": "default", "rope_theta": 7.0}


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_something_else_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 'yarn', expected dict"):
        rope_of(tmp_path, **{name: "yarn"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (SPELLINGS["theta twice"], r"rope_theta is 7\.0, and 5\.0 within rope_parameters; .* 5\.0 counts"),
        (SPELLINGS["both objects"], "rope_scaling and rope_parameters differ; as in transformers, rope_scaling counts"),
        (SPELLINGS["trained context beside"], "is 512, and 64 within rope_scaling; as in transformers, 512 counts"),
    ],
)
def test_contradictions_are_told_once(
    tmp_path: Path, settings: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_rope(*rope_of(tmp_path, **settings))
    (message,) = caplog.messages
    assert re.search(says, message)
