"""Chat templates are rendered as transformers renders them, within limits of time and memory."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mode_gguf.chat_templates import rendering
from mode_gguf.chat_templates.rendering import TemplateError, render
from mode_gguf.chat_templates.sources import chat_templates
from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.chat_template import ChatTemplate

ROOT = Path(__file__).parents[2]
TAGS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What?"}],
    [{"role": "user", "content": " Wörter\n"}, {"role": "assistant", "content": "Nun\U0001f600 <&>"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "parts"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}],
]
TEMPLATES = {
    "blocks are trimmed": "{% for m in messages %}\n    {% if loop.first %}{{ bos_token }}{% endif %}\n{{ m.role }}\n"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ {'b': 1, 'a': '<ä>'} | tojson(indent=2, sort_keys=True) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "dictionary": "{{ dict(a=1) }}{{ dict.fromkeys(['x'], 2) }}",
    "macro": "{% macro tag(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ tag(m.role) }}{% endfor %}",
    "time": "{{ strftime_now('%Y') }}",
    "methods": "{{ messages[0].role.upper() }}{{ messages[0].get('name', 'none') }}{{ messages[-1]['role'][::-1] }}",
    "undefined": "{% if tools %}tools{% endif %}{% if documents is none %}none{% endif %}{{ unheard_of }}",
    "prompt": "{% if add_generation_prompt %}go{% else %}stop{% endif %}{{ eos_token }}",
}


def by_transformers(source: str, chat: list[dict[str, Any]], *, generate: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), **TAGS)
    text: str = tokenizer.apply_chat_template(
        chat, chat_template=source, tokenize=False, add_generation_prompt=generate
    )
    return text


def ours(source: str, chat: list[dict[str, Any]], *, generate: bool) -> str:
    given = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": generate}
    return render(source, {**TAGS, **given})


def assert_equal(source: str) -> None:
    for chat in CHATS:
        for generate in (False, True):
            try:
                expected = by_transformers(source, chat, generate=generate)
            except Exception:
                with pytest.raises(TemplateError):
                    ours(source, chat, generate=generate)
            else:
                assert ours(source, chat, generate=generate) == expected


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_as_transformers_does(source: str) -> None:
    assert_equal(source)


@pytest.mark.parametrize(
    "checkpoint",
    ["pico", "pico_qwen3_5", "pico_glm4v", "pico_gemma4", "pico_internvl", "pico_mistral4", "pico_kimi_vl"],
)
def test_of_all_families(request: pytest.FixtureRequest, checkpoint: str) -> None:
    assert_equal(chat_templates(request.getfixturevalue(checkpoint)).required())


def test_of_the_demo() -> None:
    assert_equal(chat_templates(ROOT / "demo" / "Demo-VL-MoE").required())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process that renders may compute for half a second."""
    rendering._WORKER.close()
    monkeypatch.setattr(rendering, "COMPUTE_SECONDS", 0.5)
    yield
    rendering._WORKER.close()


RANGES = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
BOMBS = {
    "nested ranges": RANGES + "{% endfor %}{% endfor %}",
    "a power": "{{ 3 ** (10 ** 9) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "many long texts": "{% for a in range(9999) %}{{ 'a' * 10 ** 6 }}{% endfor %}",
    "a long output": "{{ 'a' * 10 ** 7 }}",
    "padding": "{{ 'a'.ljust(10 ** 12) }}",
    "format": "{{ '%01000000000d' | format(1) }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "growth": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a long list": "{{ [0] * 10 ** 10 }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "a long template": "a" * (2**20 + 1),
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_limits(impatient: None, source: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"model\.gguf: the stored chat template cannot be used: ") as caught:
        ChatTemplate(source, "<s>", "</s>", "model.gguf").question("What?")
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 500
    assert render("{{ messages }}", {"messages": "next"}) == "next"


def test_messages_of_a_template_are_one_line() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('no\\x1b[31m\\nway' ~ '!' * 5000) }}", {})
    assert str(caught.value).startswith("no [31m way!!!")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{% include 'worker.py' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_outside_is_reached(source: str) -> None:
    try:
        text = render(source, {"messages": []})
    except TemplateError:
        return
    assert text == "", "of what is undefined"


def test_its_process_has_no_keys_and_ends_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ours is killed in the middle."""
    script = (
        "import os, signal\n"
        "from mode_gguf.chat_templates import rendering\n"
        "assert rendering.render('{{ a }}', {'a': 'b'}) == 'b'\n"
        "print(rendering._WORKER._process.pid, flush=True)\n"
        "print(open(f'/proc/{rendering._WORKER._process.pid}/environ').read().count('SECRET'), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "MY_SECRET": "1"},
    )
    pid, secrets = result.stdout.split()
    assert secrets == "0"
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")
