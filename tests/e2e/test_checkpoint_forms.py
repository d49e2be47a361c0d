"""Forms that checkpoints are published and saved in, converted by the command as what they stand for; or refused."""

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from mode_gguf.gguf.header import read_header
from tests.checkpoint.fp8_copies import write_fp8
from tests.checkpoint.weights import changed_json, save, save_alone, weights_of
from tests.e2e.conftest import QUICK, Run

ASKED = ("--bpw", "4.0", "--no-validate", *QUICK)


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint to put into another form."""
    return Path(shutil.copytree(pico, tmp_path / "pico"))


def converted(run: Run, folder: Path, out: Path) -> dict[str, bytes]:
    """Contents of the GGUF files of a conversion, by name."""
    run("convert", folder, *ASKED, "--out", out)
    return {path.name: path.read_bytes() for path in out.glob("*.gguf")}


def test_fp8_as_what_it_stands_for(pico: Path, tmp_path: Path, run: Run) -> None:
    small, plain = write_fp8(pico, tmp_path)
    found = converted(run, small, tmp_path / "out-fp8")
    assert len(found) >= 3
    assert found == converted(run, plain, tmp_path / "out-plain")


def test_shards_without_an_index_and_with_byte_order_marks(copy: Path, pico: Path, tmp_path: Path, run: Run) -> None:
    plain = Path(shutil.copytree(pico, tmp_path / "again" / "pico"))
    (copy / INDEX_FILE).unlink()
    (copy / "generation_config.json").write_text('{"temperature": 0.5}')
    shutil.copy(copy / "generation_config.json", plain)
    for path in copy.iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert converted(run, copy, tmp_path / "out-marked") == converted(run, plain, tmp_path / "out-plain")


def test_an_adapter_beside_the_weights_is_warned_of(copy: Path, tmp_path: Path, run: Run, caplog: Any) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "Maker/Base"}')
    run("convert", copy, *ASKED, "--out", tmp_path / "out", "--dry-run")
    assert "an adapter lies beside the weights and is left out (adapter_config.json)" in caplog.text


def test_an_adapter_alone_is_refused(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Maker/Base"}')
    line = run("convert", folder, *ASKED, code=4)
    assert "only a LoRA adapter (adapter_config.json of Maker/Base) found" in line
    assert "merge it into its base model" in line


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_one_file_beside_shards_of_another_model_is_refused(
    copy: Path, tmp_path: Path, run: Run, dry: tuple[str, ...]
) -> None:
    save(copy / SINGLE_FILE, {name: value * 1.5 for name, value in weights_of(copy).items()})
    line = run("convert", copy, *ASKED, *dry, "--out", tmp_path / "out", code=4)
    assert "hold different models" in line
    assert not (tmp_path / "out").exists()


def test_names_of_a_wrapper_are_refused(copy: Path, tmp_path: Path, run: Run) -> None:
    save_alone(copy, {f"module.{name}": value for name, value in weights_of(copy).items()})
    line = run("convert", copy, *ASKED, "--out", tmp_path / "out", code=4)
    assert "'module.' in its name" in line
    assert "strip that" in line


def test_a_head_that_differs_is_in_the_file(copy: Path, tmp_path: Path, run: Run) -> None:
    config = json.loads((copy / "config.json").read_text())
    tied = {"tie_word_embeddings": True}
    changed_json(copy / "config.json", **tied, text_config={**config["text_config"], **tied})
    result = json.loads(run("convert", copy, *ASKED, "--out", tmp_path / "out", "--json"))
    assert "output.weight" in read_header(Path(result["model"])).tensors
