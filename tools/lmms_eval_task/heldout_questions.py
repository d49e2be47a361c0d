"""What lmms-eval asks of a task: the picture of a question, and whether an answer is right.

The rules are those of `mode_gguf.validation.questions.is_right`, which must be importable where lmms-eval runs.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from mode_gguf.validation.questions import is_right


def pictures(line: dict[str, Any]) -> list[Image.Image]:
    """The picture of one line of questions.jsonl, whose folder is the current one."""
    return [Image.open(Path(line["image"])).convert("RGB")]


def score(line: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 for a right answer, 0 for a wrong one."""
    return {"right": float(is_right(answers[0], line["answer"], line.get("match", "exact")))}
