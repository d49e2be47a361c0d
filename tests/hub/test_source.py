"""Checkpoints from a stand-in of the hub."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import DEFAULT_TYPES
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.hub import source
from mode_gguf.hub.source import checkpoint_folder, checkpoint_outline
from mode_gguf.pipeline import PlanSettings
from tests.hub_server import READER, WRITER, Hub

NAME = "Maker/Pico-VL-MoE"
TEMPLATE, CONTENT = "additional_chat_templates/tool_use.jinja", "{{ messages }}"


@pytest.fixture
def published(hub: Hub, pico: Path, tmp_path: Path) -> Hub:
    """The pico checkpoint on the hub, with files beside it that nobody needs."""
    folder = shutil.copytree(pico, tmp_path / "published")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling.py", "picture.png", "original/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    (folder / TEMPLATE).parent.mkdir()
    (folder / TEMPLATE).write_text(CONTENT)
    hub.add(NAME, folder)
    return hub


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched(published: Hub, pico: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mode_gguf")
    folder = checkpoint_folder(NAME)
    assert names(folder) == {*names(pico), TEMPLATE}
    for name in names(pico):
        assert (folder / name).read_bytes() == (pico / name).read_bytes()
    fetched, local = Checkpoint.open(folder), Checkpoint.open(pico)
    sha = published.repositories[NAME].commits[-1][0]
    assert (fetched.name, fetched.repository, fetched.revision) == ("Pico-VL-MoE", NAME, sha)
    assert (local.repository, local.revision) == (None, None)
    assert fetched.fingerprint == local.fingerprint
    assert f"{NAME} at {sha}" in caplog.text
    assert "MB in" in caplog.text


def test_what_is_there_is_not_fetched_again(published: Hub) -> None:
    folder = checkpoint_folder(NAME)
    published.requests.clear()
    assert checkpoint_folder(NAME) == folder
    assert published.asked("GET", "/resolve/") == []


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_a_connection_that_breaks_off_goes_on(published: Hub, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, written = (pico / SHARDS[0]).stat().st_size, 10 * 2**20  # what it takes from the network in one go
    assert size > 1.05 * written
    published.downloads_break_after = 11_000_000
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    folder = checkpoint_folder(NAME)
    assert (folder / SHARDS[0]).read_bytes() == (pico / SHARDS[0]).read_bytes()
    assert published.sent[SHARDS[0]] == 11_000_000 + size - written


def test_a_download_that_failed_keeps_the_files_it_has(
    published: Hub, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.downloads_break_after, published.refuse_after_break = 11_000_000, 500
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    published.slow = SHARDS[0]  # so that the other one is there before
    with pytest.raises(MissingResourceError, match=f"{NAME}.*run the command again"):
        checkpoint_folder(NAME)
    published.refuse = published.slow = None
    folder = checkpoint_folder(NAME)
    assert {name: published.sent[name] for name in SHARDS} == {
        SHARDS[0]: 11_000_000 + (pico / SHARDS[0]).stat().st_size,
        SHARDS[1]: (pico / SHARDS[1]).stat().st_size,
    }
    assert all((folder / name).read_bytes() == (pico / name).read_bytes() for name in SHARDS)


def test_a_revision(published: Hub, pico: Path) -> None:
    repository = published.repositories[NAME]
    first = repository.commits[-1][0]
    repository.refs["v1"] = first
    second = repository.commit({"generation_config.json": b"{}"})
    for revision, sha in {"v1": first, first: first, "main": second}.items():
        folder = checkpoint_folder(f"{NAME}@{revision}")
        assert folder.name == sha
    assert (checkpoint_folder(NAME) / "generation_config.json").read_bytes() == b"{}"
    with pytest.raises(InputError, match="no such revision"):
        checkpoint_folder(f"{NAME}@v2")


def test_without_a_connection_the_cache_serves(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_folder(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_folder(NAME) == folder
    with pytest.raises(MissingResourceError, match="cannot be reached"):
        checkpoint_folder("Maker/Other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert checkpoint_folder(NAME) == folder


def test_unknown_private_and_gated_models(published: Hub, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"Maker/Other .*no such repository.*hf auth login"):
        checkpoint_folder("Maker/Other")
    with pytest.raises(InputError, match="no name that the hub allows"):
        checkpoint_folder("Maker/Oth..er")
    published.add("Maker/Private", pico, private=True)
    published.add("Maker/Gated", pico, gated=True)
    with pytest.raises(InputError, match="no such repository"):
        checkpoint_folder("Maker/Private")
    with pytest.raises(MissingResourceError, match=r"accept the conditions.*hf auth login.*HF_TOKEN"):
        checkpoint_folder("Maker/Gated")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert names(checkpoint_folder("Maker/Private")) == names(pico)
    with pytest.raises(MissingResourceError, match="accept the conditions"):
        checkpoint_folder("Maker/Gated")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert names(checkpoint_folder("Maker/Gated")) == names(pico)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(MissingResourceError, match="does not accept the login") as refused:
        checkpoint_folder(NAME)
    assert "hf_wrong" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "found"), [("pytorch_model.bin", "pickled"), ("model-Q4_K_M.gguf", "GGUF"), ("README.md", "no weights")]
)
def test_models_without_safetensors(hub: Hub, tmp_path: Path, file: str, found: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"something")
    hub.add("Maker/Other", tmp_path)
    with pytest.raises(InputError, match=rf"Maker/Other: {found}.*expected a checkpoint in safetensors"):
        checkpoint_folder("Maker/Other")
    assert [path for path in hub.asked("GET", "/resolve/") if path.endswith((".bin", ".gguf"))] == []


def test_too_little_disk_space(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "free_bytes", lambda folder: 1_000_000)
    with pytest.raises(MissingResourceError, match="HF_HOME"):
        checkpoint_folder(NAME)
    assert [path for path in published.asked("GET", "/resolve/") if path.endswith(".safetensors")] == []


def test_a_dry_run_fetches_headers(published: Hub, pico: Path, tmp_path: Path) -> None:
    settings = PlanSettings(Budget(value=4.0), PRESETS["mode"], DEFAULT_TYPES)
    local = Checkpoint.open(pico)
    with checkpoint_outline(NAME) as (folder, download):
        outline = Checkpoint.open(folder)
        assert download is not None
        assert set(download.files) == {*names(pico), TEMPLATE}
        size = sum((pico / name).stat().st_size for name in names(pico)) + len(CONTENT)
        assert download.size_bytes == download.missing_bytes == size
        assert (outline.name, outline.repository, outline.revision) == ("Pico-VL-MoE", NAME, download.revision)
        assert outline.config == local.config
        assert {name: (found.shape, found.dtype) for name, found in outline.tensors.items()} == {
            name: (found.shape, found.dtype) for name, found in local.tensors.items()
        }
        assert settings.target(outline) == settings.target(local)
    assert not folder.exists()
    fetched = sum(published.sent[name] for name in names(pico) if name.endswith(".safetensors"))
    assert fetched <= 2 * 100_001
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    with checkpoint_outline(pico) as (folder, download):
        assert (folder, download) == (pico, None)


def test_what_an_index_names_outside_the_repository_is_not_fetched(hub: Hub, pico: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico, tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add(NAME, folder).commits[-1][1]["../../outside.safetensors"] = b"outside"
    with checkpoint_outline(NAME) as (outline, _), pytest.raises(InputError, match="outside the checkpoint folder"):
        Checkpoint.open(outline)
    assert hub.asked("GET", "outside") == []
