"""The beginning of a text that is enough for its first tokens."""

from pathlib import Path

import pytest

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.text_prefix import sufficient_prefix
from tests.calibration.conftest import noise_image

TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog. ",
    "no blanks": "abcdefghijklmnopqrstuvwxyz",
    "one letter": "a",
    "blanks": " " * 200 + "x",
    "Chinese": "\u5f53\u5730\u7684\u8336\u519c",
    "smileys": "\U0001f600\u200d",
}


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_are_those_of_the_whole_text(name: str, pico: Path) -> None:
    builder = InputBuilder.open(Checkpoint.open(pico), max_tokens=16)
    text = TEXTS[name] * (20_000 // len(TEXTS[name]))
    whole = builder.tokenizer(text, truncation=True, max_length=16)["input_ids"]
    assert builder.build(Sample("long", "tests", text=text)).input_ids.tolist() == whole
    chat = builder.build(Sample("chat", "tests", messages=(Message("user", text),)))
    rendered = builder.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert chat.input_ids.tolist() == builder.tokenizer(rendered, add_special_tokens=False)["input_ids"][:16]


def test_short_texts_are_not_counted() -> None:
    def count(text: str) -> int:
        raise AssertionError("a second of work")

    assert sufficient_prefix("word " * 10, 16, count) == "word " * 10


def test_little_is_read_of_much() -> None:
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 100  # blanks, say

    assert len(sufficient_prefix(" " * 10_000_000, 512, count)) == seen[-1] < 300_000
    assert len(seen) <= 3


def test_long_questions_about_pictures(pico: Path) -> None:
    builder = InputBuilder.open(Checkpoint.open(pico), max_tokens=16)
    asked = "fox " * 10_000
    short, long = (
        builder.build(Sample("i", "tests", messages=(Message("user", text),), image=noise_image(0)))
        for text in (asked[:400], asked)
    )
    assert short.input_ids.tolist() == long.input_ids.tolist()
    behind = Sample("i", "tests", messages=(Message("user", asked, (len(asked),)),), image=noise_image(0))
    with pytest.raises(InputError, match=r"^i: [\d,]+ characters stand before the last picture, 1,024 at most"):
        builder.build(behind)
