"""`convert` again in the same folder after something changed: what depends on it is made anew, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.gguf.header import read_header
from tests.e2e.conftest import Run, settings

TEXT = "The quick brown fox jumps over the lazy dog. The square is red.\n" * 3
QUICK = (*settings("sensitivity.packing.mode=exact"), "--preset", "paper", "--no-validate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pico: Path) -> tuple[Path, Path, Path]:
    """A copy of the model, text to calibrate on, and the work folder, which the first test fills."""
    path = tmp_path_factory.mktemp("changed")
    model, data = Path(shutil.copytree(pico, path / pico.name)), path / "data"
    data.mkdir()
    (data / "text.txt").write_text(TEXT)
    return model, data, path / "work"


def converted(run: Run, folders: tuple[Path, Path, Path], *more: str) -> tuple[set[str], dict[str, object]]:
    """Stages that ran, and the model's metadata."""
    model, data, out = folders
    asked = ("convert", model, "--bpw", "4.0", "--out", out, "--calibration", data, "--json", *QUICK, *more)
    result = json.loads(run(*asked))
    ran = {stage for stage, seconds in result["seconds"].items() if seconds}
    return ran, dict(read_header(Path(result["model"])).metadata)


def refused(run: Run, folders: tuple[Path, Path, Path]) -> str:
    model, data, out = folders
    return run("convert", model, "--bpw", "4.0", "--out", out, "--calibration", data, *QUICK, code=2)


def test_only_what_depends_on_a_change_runs_again(folders: tuple[Path, Path, Path], run: Run) -> None:
    model, _, _ = folders
    ran, _ = converted(run, folders)
    assert ran == {"calibrate", "sensitivity", "plan", "export", "projector"}
    assert converted(run, folders)[0] == set()

    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": "CORRECTED" + config["chat_template"]}))
    ran, metadata = converted(run, folders)
    assert ran == {"export"}, "no sample is a chat"
    assert str(metadata["tokenizer.chat_template"]).startswith("CORRECTED")

    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.125}))
    ran, metadata = converted(run, folders)
    assert ran == {"export", "projector"}
    assert metadata["general.sampling.temp"] == 0.125
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    ran, metadata = converted(run, folders)
    assert ran == {"export", "projector"}
    assert metadata["general.license"] == "mit"
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.25, 0.25, 0.25]}))
    assert converted(run, folders)[0] == {"projector"}, "no sample has a picture"


def test_measurements_of_another_input_are_refused_by_name(folders: tuple[Path, Path, Path], run: Run) -> None:
    model, data, out = folders
    (model / "added_tokens.json").write_text("{}")
    assert "`calibrate` was run here with other settings (added_tokens.json: none then, " in refused(run, folders)
    (model / "added_tokens.json").unlink()
    (data / "text.txt").write_text(TEXT + "One more.")
    assert "its samples: " in refused(run, folders)
    (data / "text.txt").write_text(TEXT)
    assert converted(run, folders)[0] == set(), "everything is as it was"

    stored = Checkpoint.open(model).tensors["model.language_model.embed_tokens.weight"]
    with stored.file.open("rb+") as file:
        file.seek(stored.offset)
        file.write(bytes(64))
    assert "model fingerprint: " in refused(run, folders)
    for command in (("plan", "--bpw", "4.0"), ("export",), ("sensitivity", "--method", "expert-mse")):
        line = run(command[0], model, "--out", out, *command[1:], code=4)
        assert "made from a model with fingerprint" in line
    ran, _ = converted(run, folders, "--restart")
    assert ran == {"calibrate", "sensitivity", "plan", "export", "projector"}
