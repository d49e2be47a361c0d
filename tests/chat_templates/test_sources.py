"""Which of a checkpoint's chat templates counts: the same one for calibration and for the GGUF file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from mode_gguf.architectures import find_family
from mode_gguf.chat_templates.sources import chat_templates
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.forward.tokenizer import open_tokenizer
from tests.e2e.conftest import Run, ended, run, samples
from tests.families.pico.tokenizer import CHAT_TEMPLATE

__all__ = ["ended", "run"]

Change = Callable[[Path], None]
OTHER = "OTHER" + CHAT_TEMPLATE


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint to change; its template is in tokenizer_config.json."""
    return Path(shutil.copytree(pico, tmp_path / "checkpoint"))


def configured(template: Any, name: str = "tokenizer_config.json") -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        settings = json.loads(path.read_text()) if path.exists() else {}
        settings["chat_template"] = template
        if template is None:
            del settings["chat_template"]
        path.write_text(json.dumps(settings))

    return change


def jinja(text: str, name: str = "chat_template.jinja") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def several(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


NAMED = [{"name": "tool_use", "template": "TOOLS"}, {"name": "default", "template": OTHER}]
TOOLS = jinja("TOOLS", "additional_chat_templates/tool_use.jinja")
LIKE_THE_TOKENIZER: dict[str, tuple[Change, str]] = {
    "configuration": (configured(OTHER), "tokenizer_config.json"),
    "file": (several(configured(None), jinja(OTHER)), "chat_template.jinja"),
    "file and another configuration": (jinja(OTHER), "chat_template.jinja"),
    "file and another processor": (several(jinja(OTHER), configured("X", "chat_template.json")), "chat_template.jinja"),
    "list": (configured(NAMED), "tokenizer_config.json"),
    "files": (several(jinja(OTHER), TOOLS), "chat_template.jinja"),
    "line ends": (jinja(OTHER.replace("\n", "\r\n")), "chat_template.jinja"),
}


@pytest.mark.parametrize(("change", "file"), LIKE_THE_TOKENIZER.values(), ids=LIKE_THE_TOKENIZER)
def test_as_transformers_tokenizer(copy: Path, change: Change, file: str) -> None:
    change(copy)
    found, checkpoint = chat_templates(copy), Checkpoint.open(copy)
    theirs = AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
    assert (found.default, found.file.name) == (theirs.get_chat_template(), file)
    named = theirs.chat_template if isinstance(theirs.chat_template, dict) else {}
    assert found.named == {name: text for name, text in named.items() if name != "default"}
    assert open_tokenizer(checkpoint, find_family(checkpoint)).chat_template == found.default


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_processors_template_comes_before_its_tokenizers(copy: Path, name: str) -> None:
    """As transformers' processors have it, which put pictures into prompts."""
    configured(OTHER, name)(copy)
    found = chat_templates(copy)
    assert (found.default, found.file.name) == (OTHER, name)
    assert [path.name for path in found.overruled] == ["tokenizer_config.json"]


def test_the_file_has_what_calibration_used(copy: Path, tmp_path: Path, ended: Any) -> None:
    """Named templates too, under the keys of llama.cpp's converter; the choice is said."""
    several(jinja(OTHER), TOOLS)(copy)
    ended("calibrate", copy, "--out", tmp_path / "out", *samples(1, 1))
    ended("plan", copy, "--uniform", "Q8_0", "--out", tmp_path / "out")
    ended("export", copy, "--out", tmp_path / "out")
    (path,) = (file for file in (tmp_path / "out").glob("*.gguf") if "Q8_0" in file.name)
    fields = GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == OTHER
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "TOOLS"
    journal = "".join(path.read_text() for path in (tmp_path / "out").glob("*.log"))
    assert "the chat template of chat_template.jinja is used, in the GGUF file too" in journal


def test_a_template_in_chat_template_json_is_enough(copy: Path, tmp_path: Path, run: Run) -> None:
    several(configured(None), configured(CHAT_TEMPLATE, "chat_template.json"))(copy)
    run("calibrate", copy, "--out", tmp_path / "out", *samples(1, 1))


def test_texts_need_no_template(copy: Path, tmp_path: Path, run: Run) -> None:
    configured(None)(copy)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    run("calibrate", copy, "--calibration", tmp_path / "texts", "--out", tmp_path / "out")
    assert chat_templates(copy).default is None


BROKEN: dict[str, tuple[Change, str]] = {
    "none": (configured(None), "checkpoint: no chat template found"),
    "named ones only": (several(configured(None), TOOLS), r"no chat template found.*tool_use"),
    "syntax": (jinja("{% if %}"), r"chat_template\.jinja: the chat template cannot be used: TemplateSyntaxError"),
    "division": (jinja(CHAT_TEMPLATE + "{{ 1/0 }}"), r"chat_template\.jinja: .*ZeroDivisionError: division by zero"),
    "a missing function": (configured(CHAT_TEMPLATE + "{{ f() }}"), r"tokenizer_config\.json: .*'f' is undefined"),
    "a refusal": (jinja("{{ raise_exception('never') }}"), r"chat_template\.jinja: .*never"),
    "memory": (jinja("{{ 'a' * 10 ** 10 }}"), r"chat_template\.jinja: .*too much memory"),
    "dropped messages": (jinja("hello"), r"chat_template\.jinja drops the user's message"),
    "a number": (configured(3), r"tokenizer_config\.json: chat_template is int"),
    "a list of numbers": (configured([3]), r"tokenizer_config\.json: chat_template is list"),
    "a list without names": (configured([{"template": "x"}]), r"tokenizer_config\.json: chat_template is list"),
    "no UTF-8": (lambda folder: void((folder / "chat_template.jinja").write_bytes(b"\xff\xfe")), "UTF-8"),
    "a folder": (lambda folder: (folder / "chat_template.jinja").mkdir(), "a text file expected"),
    "half a character": (configured(CHAT_TEMPLATE + "\ud800"), "no Unicode text"),
    "Git LFS": (jinja("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"), "git lfs pull"),
    "no picture": (
        jinja("{% for m in messages %}{{ m.content if m.content is string else m.content[1].text }}{% endfor %}"),
        "placed 0 images",
    ),
}


def void(_: object) -> None:
    return None


@pytest.mark.parametrize(("change", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_templates_are_found_at_once(copy: Path, tmp_path: Path, ended: Any, change: Change, says: str) -> None:
    """Not as a fault of a sample of ours."""
    change(copy)
    _, (line,) = ended("calibrate", copy, "--out", tmp_path / "out", *samples(1, 1), code=4)
    with pytest.raises(InputError, match=says):
        raise InputError(line)
    assert str(copy) in line
    assert "built-in" not in line
