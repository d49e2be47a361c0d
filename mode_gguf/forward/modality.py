"""Kinds of tokens and of answers, and the choice of key tokens by name: what files hold, free of torch."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mode_gguf.errors import UsageError

TEXT, KEY_VISION, REDUNDANT_VISION = range(3)
"""Modalities, in the order of every array."""
MODALITIES = ("text", "key_vision", "redundant_vision")

ANSWERS = ("text", "image")
"""Kinds of scored positions, in the order of every array: of samples without, and with, an image."""

Criterion: TypeAlias = Literal[
    "text-attention", "all", "redundant", "random", "received-attention", "max-min-diversity"
]
"""`text-attention`: those the text attends to most (the paper's); `redundant`: as many of those it attends to least
(the paper's "text + redundant" baseline); `all`: every one (its "text + all vision" baseline); `random`: drawn anew for
every sample and layer; `received-attention`: those that all later tokens, of text and image, attend to most;
`max-min-diversity`: those that differ most from each other (DivPrune), see `most_diverse`."""
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


@dataclass(frozen=True, slots=True)
class KeyTokens:
    """How key vision tokens are chosen; what does not matter to the criterion is dropped, so that equal means alike.

    Attributes:
        criterion: see `Criterion`.
        ratio: share of an image's tokens that are key, 0 < ratio <= 1; `all` makes it 1.
        seed: of `random`; any other criterion makes it 0.

    Raises:
        UsageError: unknown criterion, or a ratio out of range.
    """

    criterion: Criterion = "text-attention"
    ratio: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise UsageError(f"unknown criterion of key tokens {self.criterion!r}: choose from {', '.join(CRITERIA)}")
        if not 0 < self.ratio <= 1:
            raise UsageError(
                f"key ratio {self.ratio} is out of range: choose a share of the vision tokens above 0, up to 1"
            )
        if self.criterion == "all":
            object.__setattr__(self, "ratio", 1.0)
        if self.criterion != "random":
            object.__setattr__(self, "seed", 0)

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.criterion == "random" else ""
        return f"{self.criterion}, ratio {self.ratio:g}{seed}"

    def count(self, n_vision: int) -> int:
        """How many of an image's tokens are key."""
        return max(1, int(self.ratio * n_vision))


TEXT_ATTENTION = KeyTokens()
"""The paper's choice."""
