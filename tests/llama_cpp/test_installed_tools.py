"""The user's llama.cpp tools, played by small scripts, and the embedded one."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp.installed_tools import LlamaCppTools, find_llama_cpp, smoke_test
from mode_gguf.llama_cpp_library import ENVIRONMENT_VARIABLE
from tests.llama_cpp.stand_ins import write_program
from tests.validation.conftest import Files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")

ANSWERS = "echo ' A red square. '"


def write_tool(folder: Path, name: str, body: str = ANSWERS) -> Path:
    version = 'if [ "$1" = --version ]; then echo "version: 7777 (abcdef)" >&2; exit 0; fi'
    return write_program(folder / name, f"{version}\n{body}")


@pytest.fixture(autouse=True)
def _no_llama_cpp_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")


@pytest.mark.parametrize("place", ["folder", "folder/bin", "folder/build/bin"])
def test_folder(tmp_path: Path, place: str) -> None:
    program = write_tool(tmp_path / place, "llama-mtmd-cli")
    tools = find_llama_cpp(tmp_path / "folder")
    assert tools["llama-mtmd-cli"] is not None
    assert tools["llama-mtmd-cli"].samefile(program)
    assert tools.version == "7777 (abcdef)"
    assert tools["llama-server"] is None


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_llama_cpp() == LlamaCppTools({}, None)
    on_path = write_tool(tmp_path / "path", "llama-server")
    assert find_llama_cpp()["llama-server"] == on_path
    named = write_tool(tmp_path / "named", "llama-server")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "named"))
    found = find_llama_cpp()["llama-server"]
    assert found is not None
    assert found.samefile(named)
    with pytest.raises(InputError, match="holds none of llama-server, llama-mtmd-cli"):
        find_llama_cpp(tmp_path / "empty")


def test_smoke_test_of_the_users_tool(tmp_path: Path) -> None:
    record = tmp_path / "arguments"
    write_tool(tmp_path, "llama-mtmd-cli", f'echo "$@" > {record}\n{ANSWERS}')
    model, mmproj, image = (tmp_path / name for name in ("m.gguf", "mmproj-m.gguf", "i.png"))
    test = smoke_test(model, mmproj, image, find_llama_cpp(tmp_path), threads=2)
    assert test.answer == "A red square."
    assert "llama-mtmd-cli (7777 (abcdef))" in test.runtime
    assert f"-m {model} --mmproj {mmproj} --image {image}" in record.read_text()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo cannot load >&2; exit 3", "exit code 3: cannot load"),
        ("true", "it answered nothing"),
        ("exec sleep 20", "no answer within 1 seconds"),
    ],
)
def test_smoke_test_that_fails(tmp_path: Path, body: str, message: str) -> None:
    write_tool(tmp_path, "llama-mtmd-cli", body)
    model, mmproj, image = (tmp_path / name for name in ("m.gguf", "mmproj-m.gguf", "i.png"))
    with pytest.raises(ValidationError, match=rf"m\.gguf with .*mmproj-m\.gguf does not work in .*{message}"):
        smoke_test(model, mmproj, image, find_llama_cpp(tmp_path), timeout_seconds=1)


def test_smoke_test_of_the_embedded_build(small: Files, held_out_folder: Path) -> None:
    image = held_out_folder / "images" / "0.png"
    test = smoke_test(small.text, small.mmproj, image, LlamaCppTools({}, None), threads=1)
    assert test.answer
    assert "xllamacpp" in test.runtime
    with pytest.raises(ValidationError, match=r"exit code 5: .*llama\.cpp cannot load it"):
        smoke_test(small.mmproj, small.mmproj, image, LlamaCppTools({}, None), threads=1)


def test_paths_that_begin_with_a_dash(
    small: Files, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "-my work"
    folder.mkdir()
    for name, file in (("m.gguf", small.text), ("mmproj.gguf", small.mmproj)):
        shutil.copyfile(file, folder / name)
    picture.save(folder / "i.png")
    monkeypatch.chdir(tmp_path)
    model, mmproj, image = (Path("-my work", name) for name in ("m.gguf", "mmproj.gguf", "i.png"))
    assert smoke_test(model, mmproj, image, LlamaCppTools({}, None), threads=1).answer
