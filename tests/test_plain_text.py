"""Texts of strangers on a terminal, in a shell and in file names."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.plain_text import NAME_BYTES, file_name_part, one_line, printable, shell_line

ANY = st.text(st.characters(codec="utf-8"), max_size=80) | st.text("-._ ab|<\n\x1b\udcff'\"`%/\\*?漢é", max_size=200)


@pytest.mark.parametrize(
    "name", ["Qwen3-VL-30B-A3B-Instruct", "gpt_oss.20b", "my model (new)", "v1.5+ft@2", "Über-Modell", "漢字", "हिन्दी"]
)
def test_ordinary_names_stay(name: str) -> None:
    assert file_name_part(name) == name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pi\nco", "pi_co"),
        ("-dash", "dash"),
        (".hidden", "hidden"),
        ("end . ", "end"),
        ('it\'s "a" <b>|c', "it_s _a_ _b_c"),
        ("a/../b\\c", "a_.._b_c"),
        ("50%s#1?x=*[1]", "50_s_1_x=_1"),
        ("pi\udcffco", "pi_co"),
        ("\x1b[31mred", "31mred"),
        ("$(rm);`x`&", "(rm)_x"),
        ("\n", "model"),
        ("mmproj-a", "mm_proj-a"),
        ("a-imatrix", "a-i_matrix"),
        ("-mtp-a", "mtp_a"),
        ("...", "model"),
        ("", "model"),
    ],
)
def test_other_names(name: str, part: str) -> None:
    assert file_name_part(name) == part


@given(ANY)
def test_parts_of_file_names(name: str) -> None:
    part = file_name_part(name)
    assert part == file_name_part(part)
    assert part.isprintable()
    assert 0 < len(part.encode()) <= NAME_BYTES
    assert not set(part) & set("/\\<>:\"'|?*`%$&;#!{}[]\n")
    assert part[0] not in " .-"
    assert part[-1] not in " ."


@given(ANY)
def test_lines(text: str) -> None:
    assert one_line(text).isprintable()
    assert len(one_line(text, 20)) <= 20 * 10
    assert printable(text, kept="").isprintable()


def test_commands() -> None:
    words: list[str | Path] = ["mode-gguf", "run", Path("-a b"), Path("/x/it's"), "--out", "a\nb"]
    assert shell_line(words) == "mode-gguf run './-a b' '/x/it'\"'\"'s' --out 'a\nb'"
    assert shlex.split(shell_line(words)) == ["mode-gguf", "run", "./-a b", "/x/it's", "--out", "a\nb"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), max_size=4))
def test_words_survive_a_shell(words: list[str]) -> None:
    line = shell_line(["printf", r"%s\0", *words, ""])
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True, timeout=20)
    assert done.stdout.decode().split("\0")[: len(words)] == words
