"""Modalities, answer types and key-token criteria as files hold them, free of torch."""

from dataclasses import dataclass

from mode_gguf.errors import UsageError
from mode_gguf.options import CalibrationOptions
from mode_gguf.vocabulary import KEY_TOKEN_RULES, KeyTokenRule

TEXT, KEY_VISION, REDUNDANT_VISION = range(3)
"""Modalities, in the order of every array."""
MODALITIES = ("text", "key_vision", "redundant_vision")

ANSWERS = ("text", "image")
"""Types of scored positions, in the order of every array: of samples without, and with, an image."""


@dataclass(frozen=True, slots=True)
class KeyTokens:
    """Criterion of key vision tokens; settings that do not matter to it are dropped, so that equal means alike.

    Attributes:
        criterion: name of the rule.
        ratio: share of an image's tokens that are key, 0 < ratio <= 1; `all` makes it 1.
        seed: of `random`; any other criterion makes it 0.

    Raises:
        UsageError: unknown criterion, or a ratio out of range.
    """

    criterion: KeyTokenRule = CalibrationOptions.key_tokens
    ratio: float = CalibrationOptions.key_ratio
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in KEY_TOKEN_RULES:
            rules = ", ".join(KEY_TOKEN_RULES)
            raise UsageError(f"unknown criterion of key tokens {self.criterion!r}: choose from {rules}")
        if not 0 < self.ratio <= 1:
            raise UsageError(
                f"key ratio {self.ratio} is out of range: choose a share of the vision tokens above 0, up to 1"
            )
        if self.criterion == "all":
            object.__setattr__(self, "ratio", 1.0)
        if self.criterion != "random":
            object.__setattr__(self, "seed", 0)

    @classmethod
    def of(cls, options: CalibrationOptions) -> "KeyTokens":
        """The criterion that calibration's options name."""
        return cls(options.key_tokens, options.key_ratio, options.seed)

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.criterion == "random" else ""
        return f"{self.criterion}, ratio {self.ratio:g}{seed}"

    def count(self, n_vision: int) -> int:
        """Number of key tokens among an image's `n_vision`."""
        return max(1, int(self.ratio * n_vision))


TEXT_ATTENTION = KeyTokens()
"""The paper's criterion."""
