"""Checkpoints that a family must refuse, as other settings in config.json, and what the refusal says."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mode_gguf.architectures import find_family


@dataclass(frozen=True)
class Refusal:
    """Settings of a section of config.json, None for the outermost; a value None removes one.

    Attributes:
        says: pattern of the message.
        by: what refuses them.
        layout: fixture of the checkpoint, the case's first by default.
    """

    section: str | None
    settings: Mapping[str, Any]
    says: str
    by: Callable[..., Any] = find_family
    layout: str | None = None

    @property
    def name(self) -> str:
        (key, value), *_ = self.settings.items()
        return f"{key}={value}".replace(" ", "")[:60]


def unlike(section: str | None, *, names: str = "", layout: str | None = None, **settings: Any) -> list[Refusal]:
    """Settings each of which alone is refused by its name, with `names` before it, and what was expected."""
    return [
        Refusal(section, {key: value}, rf"config\.json: (vision )?{names}{key}\b.* is .*expected", layout=layout)
        for key, value in settings.items()
    ]


def of_rope(setting: str, section: str, name: str, *values: Mapping[str, Any]) -> list[Refusal]:
    """Values of a setting of rotary embeddings, refused by names within them."""
    return [Refusal(section, {setting: value}, rf"config\.json: {name} is .*expected") for value in values]


def refused_ropes(**settings: Any) -> list[dict[str, Any]]:
    """Scalings that llama.cpp's decoders do not run as transformers does, with `settings` beside them."""
    scalings: list[dict[str, Any]] = [
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]},
        {"type": "su", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"type": "mrope"},
        {"rope_type": None, "type": "yarn"},
        {"factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16},
        {"rope_type": "yarn", "factor": 4.0, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": "4"},
        {"rope_type": "yarn", "factor": math.nan},
        {"rope_type": "linear", "factor": 10**400},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10**12},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": -10 / math.log(4.0)},
        {"rope_type": "default", "rope_theta": 0.0},
        {"rope_type": "default", "rope_theta": math.inf},
    ]
    return [{**settings, **scaling} for scaling in scalings]


TEXT, VISION = "text_config", "vision_config"
"""Sections of config.json."""
