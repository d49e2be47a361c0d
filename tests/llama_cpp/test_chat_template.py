"""Chat templates of the kinds that are around."""

import pytest

from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.chat_template import ChatTemplate

TURN = (
    "{% for m in messages %}<{{ m.role }}>{{ CONTENT }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = "{% for part in m.content %}{% if part is mapping %}{{ part.text }}{% endif %}{% endfor %}"


def template(content: str) -> ChatTemplate:
    return ChatTemplate("{{ bos_token }}" + TURN.replace("{{ CONTENT }}", content), "<s>", "</s>", "model.gguf")


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ m['content'] | trim }}", PARTS])
def test_strings_and_parts(content: str) -> None:
    assert template(content).question("What?", "<image>") == "<s><user><image>What?<assistant>"
    assert template(content).question("What?") == "<s><user>What?<assistant>"


@pytest.mark.parametrize("content", ["{{ m.content }}", PARTS])
def test_what_follows_an_answer(content: str) -> None:
    assert template(content + "{{ eos_token }}\n").after_answer() == "</s>\n"


def test_thinking_is_switched_off() -> None:
    assert "quiet" in template("{{ m.content }}{% if enable_thinking is false %}quiet{% endif %}").question("What?")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{% if %}", "Expected an expression"),
        ("nothing", "does not hold the messages"),
        ("{{ m.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_unusable_templates(content: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"model\.gguf: .*{reason}"):
        template(content).question("What?")
