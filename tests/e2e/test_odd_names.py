"""Names that come from folders and model cards: in files, on the card, in commands, on the page and the terminal."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from gguf import GGUFWriter
from markdown_it import MarkdownIt

from mode_gguf.artifacts import write_json
from mode_gguf.hub.names import is_model_file
from mode_gguf.pipeline import find_model_files
from mode_gguf_cli.main import main
from tests.e2e.conftest import QUICK, Run, settings

TARGET = "someone/Odd-GGUF"
UNIFORM = ("--uniform", "Q4_K", *settings("sensitivity.packing.mode=exact"))
NAMES = [
    "pi\nco",
    "\x1b[31mred\x07",
    'it\'s "odd"',
    "-dash",
    "a|b `c` _d_ *e*",
    "<script>alert(1)</script>"[:8],
    "über 漢字",
    "end ",
    "x" * 220,
    "100%s%n",
    "$(touch owned);&",
    ".hidden",
    "[red]x[/y]",
    "mmproj-imatrix",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_from_the_folder_to_the_card(name: str, pico: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / name
    shutil.copytree(pico, model)
    out = tmp_path / f"work {name[:50]}"
    run("plan", model, *UNIFORM, "--out", out)
    made = json.loads(run("export", model, "--out", out, "--json"))
    names = [path.name for path in out.iterdir() if path.suffix == ".gguf"]
    assert len(names) == 2
    for file in names:
        assert re.fullmatch(r"[\w .()+@=~-]+", file)
        assert file[0] not in "-."
    shown = run("publish", TARGET, out, "--unvalidated")
    assert "\x1b" not in shown
    run("publish", TARGET, out, "--card-only")
    text = (out / "README.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
    assert not [part for token in tokens for part in (token, *(token.children or ())) if "html" in part.type]
    commands = [shlex.split(line) for token in tokens if token.type == "fence" for line in token.content.splitlines()]
    served = next(words for words in commands if words[:2] == ["llama-server", "-m"])
    assert served[2:] == [Path(made["model"]).name, "--mmproj", Path(made["mmproj"]).name]
    assert ["mode-gguf", "plan"] in [words[:2] for words in commands]
    assert "\x1b" not in text
    page = Path(json.loads(run("report", out, "--json"))["page"]).read_text()
    assert "<script>alert" not in page
    run("inspect", made["model"])
    assert find_model_files(out).model == Path(made["model"])
    assert is_model_file(made["model"])
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in (out / "mode-gguf.log").read_text().splitlines()), (
        "a line a message"
    )


def test_convert_says_how_to_talk_to_it(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pico, tmp_path / "pi\nco")
    arguments = ["pi\nco", "--bpw", "4.5", "--out=-my work", "--no-validate", "--threads", "1", *QUICK]
    monkeypatch.setattr(sys, "argv", ["mode-gguf", "convert", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "talk to it with: mode-gguf run './-my work'\n" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["mode-gguf", "publish", TARGET, "./-my work", "--card-only"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "mode-gguf convert" in Path("-my work", "README.md").read_text()


def test_bytes_that_are_no_text(pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / os.fsdecode(b"pi\xffco")
    shutil.copytree(pico, model)
    for arguments in (("plan", model, *UNIFORM), ("inspect", model), ("plan", pico, *UNIFORM, "--out", model / "out")):
        line = run(*arguments, code=4)
        assert "pi\\udcffco" in line
        assert "not UTF-8; rename" in line
    monkeypatch.chdir(model)
    assert "not UTF-8; rename" in run("plan", ".", *UNIFORM, code=4)


def test_names_of_tensors(tmp_path: Path, run: Run) -> None:
    """A table takes them as they are: neither markup, nor lines, nor what steers a terminal."""
    names = ["[red]blk.0[/nothing]", "blk.\x1b[2J\x1b]0;owned\x07", "a\nb:smile:", "\u202egpj"]
    path = tmp_path / "[bold].gguf"
    writer = GGUFWriter(path, "llama")
    for name in names:
        writer.add_tensor(name, np.zeros((1, 32), np.float32))
    writer.add_string("general.name", "[/x]\x1b[31m:smile:")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for arguments in ((), (path,)):
        shown = run("inspect", path, *arguments)
        assert shown.replace("\n", "").isprintable()
        for name in ("[red]blk.0[/nothing]", "blk.\\x1b[2J\\x1b]0;owned\\x07", "a\\nb:smile:", "\\u202egpj"):
            assert name in shown


CARD = {
    "license": "mit</div><script>alert(1)</script>",
    "license_name": "a|b`c`<img src=x onerror=alert(1)>\nd",
    "license_link": "javascript:alert(1)",
    "base_model": 'evil"><script>/x|y`z',
    "tags": ["<script>", "|", "---\n- x"],
    "language": ["en", "<script>alert(1)</script>", "pt-BR"],
    "datasets": ["a/b<script>", "good/set"],
    "author": "<script>",
    "model_name": "x|y<script>",
}


def test_a_card_of_a_stranger(pico: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(pico, model)
    (model / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n# <script>\n")
    run("plan", model, *UNIFORM, "--out", out)
    run("export", model, "--out", out)
    plan = json.loads((out / "plan.json").read_text())
    run("publish", TARGET, out, "--card-only")
    text = (out / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    found = yaml.safe_load(front)
    assert found["license"] == "other"
    assert found["license_name"] == "a|b`c`<img src=x onerror=alert(1)> d"
    assert "license_link" not in found
    assert found["language"] == ["en", "pt-BR"]
    assert "leaves out the link to the licence, javascript:alert(1)" in caplog.text
    assert "javascript:" not in text
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    assert not [part for token in tokens for part in (token, *(token.children or ())) if "html" in part.type]
    page = Path(json.loads(run("report", out, "--json"))["page"]).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    plan["made_from"]["repository"] = "x/y](javascript:alert(1))<script>"
    write_json(out / "plan.json", plan)
    assert "was changed after" in run("publish", TARGET, out, "--card-only", code=4)


def test_links_of_a_licence(pico: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    for number, (link, shown) in enumerate(
        {
            "LICENSE.md": "https://huggingface.co/Maker/Pico/blob/main/LICENSE.md",
            "https://x.org/l": "https://x.org/l",
        }.items()
    ):
        out = tmp_path / f"out{number}"
        (model / "README.md").write_text(f"---\nlicense: other\nlicense_link: {link}\n---\n")
        run("plan", model, *UNIFORM, "--out", out)
        run("export", model, "--out", out)
        run("publish", TARGET, out, "--card-only", "--base-model", "Maker/Pico")
        assert f"license_link: {shown}\n" in (out / "README.md").read_text()
