"""What a later stage would refuse is refused by the dry run, and by `convert` before anything is measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import QUICK, Ended, Run
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

Change = Callable[[Path], None]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("whole") / "whole", shards=1)


def config(**changes: Any) -> Change:
    """Other settings; `text__` and `vision__` before a name stand for the sections."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        for name, value in changes.items():
            section, _, inner = name.rpartition("__")
            (settings[f"{section}_config"] if section else settings)[inner] = value
        path.write_text(json.dumps(settings))

    return change


def weights(edit: Callable[[Weights], None]) -> Change:
    def change(folder: Path) -> None:
        stored = dict(load_file(folder / "model.safetensors"))
        edit(stored)
        save_file({name: value.clone() for name, value in stored.items()}, folder / "model.safetensors")

    return change


def file(name: str, content: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(content)

    return change


def images(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def shorter_head(stored: Weights) -> None:
    stored["lm_head.weight"] = stored["lm_head.weight"][:-8].clone()


def wider_merger(stored: Weights) -> None:
    name = "model.visual.merger.linear_fc2.weight"
    stored[name] = torch.cat([stored[name], stored[name]])


REFUSED: dict[str, tuple[Change, str]] = {
    "top-k": (config(text__num_experts_per_tok=8), "num_experts_per_tok is 8, expected 1 to 4"),
    "no top-k": (config(text__num_experts_per_tok=0), "num_experts_per_tok is 0"),
    "negative context": (config(text__max_position_embeddings=-4), "context_length would be -4"),
    "huge context": (config(text__max_position_embeddings=2**40), "context_length would be"),
    "infinite rope": (config(text__rope_theta=1e300), "rope"),
    "kv heads": (config(text__num_key_value_heads=5), "k_proj"),
    "patches": (config(vision__patch_size=8), "patch_embed"),
    "vision width": (config(vision__hidden_size=96), "visual"),
    "head's rows": (weights(shorter_head), "lm_head.weight has shape"),
    "merger's rows": (weights(wider_merger), "merger.linear_fc2.weight has shape"),
    "vision tensor": (
        weights(lambda stored: stored.__delitem__("model.visual.merger.linear_fc2.weight")),
        "merger.linear_fc2.weight is missing",
    ),
    "mean of two": (images(image_mean=[0.5, 0.5]), "image_mean is"),
    "mean of words": (images(image_mean=["a", "b", "c"]), "image_mean is"),
    "generation settings": (file("generation_config.json", '{"top_k": 20'), "generation_config.json"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_dry_run_and_convert_refuse_it_at_once(whole: Path, tmp_path: Path, run: Run, fault: str) -> None:
    change, says = REFUSED[fault]
    folder, out = Path(shutil.copytree(whole, tmp_path / "model")), tmp_path / "out"
    change(folder)
    asked = ("convert", folder, "--bpw", "4", "--out", out, *QUICK, "--no-validate")
    for line in (run(*asked, "--dry-run", code=4), run(*asked, code=4)):
        assert says in line
        assert str(folder) in line or "config.json" in line
    assert not out.exists()


CARD = """---
name: 7
version: 1.5
license: [apache-2.0, 2.0]
tags: [moe, 2025, 2024-05-01, true, null, {deep: 1}]
language: [en, no]
datasets: [2025, {name: 12, url: {odd: 1}}]
model_creator: [a, b]
base_model: [{deep: [1]}, 3]
---
"""


def test_what_a_model_says_about_itself_never_stops_it(whole: Path, tmp_path: Path, ended: Ended) -> None:
    folder, out = Path(shutil.copytree(whole, tmp_path / "model")), tmp_path / "out"
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text(
        json.dumps({"top_k": 20.0, "top_p": "0.9", "temperature": 10**400, "mirostat": 2**40, "min_p": 0})
    )
    asked = ("convert", folder, "--bpw", "4", "--out", out, *QUICK, "--no-validate", "--json")
    said, _ = ended(*asked)
    log = (out / "mode-gguf.log").read_text()
    for field in ("tags is dict", "datasets.url is dict", "model_creator is list", "top_p is '0.9'", "mirostat is"):
        assert field in log, field
    keys = {name: field.contents() for name, field in GGUFReader(json.loads(said)["model"]).fields.items()}
    assert keys["general.name"] == "7"
    assert keys["general.version"] == "1.5"
    assert keys["general.license"] == "apache-2.0,2.0"
    assert keys["general.tags"] == ["moe", "2025", "2024-05-01", "true"]
    assert keys["general.languages"] == ["en", "no"]
    assert (keys["general.dataset.count"], keys["general.dataset.1.name"]) == (2, "12")
    assert keys["general.sampling.top_k"] == 20
    assert keys["general.sampling.min_p"] == 0
    assert "general.sampling.top_p" not in keys


def test_a_plain_dot_is_named_after_its_folder(
    whole: Path, tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "Nice-VL"))
    monkeypatch.chdir(folder)
    said, _ = ended("convert", ".", "--bpw", "4", "--out", tmp_path / "out", *QUICK, "--no-validate", "--json")
    model = Path(json.loads(said)["model"])
    assert model.name.startswith("Nice-VL-")
    assert GGUFReader(model).fields["general.name"].contents() == "Nice VL"


def test_validation_is_checked_before_anything_is_measured(whole: Path, tmp_path: Path, run: Run) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"text": "Nothing but a text."}\n')
    out = tmp_path / "out"
    for wrong, says, code in (
        (("--samples", tmp_path / "nothing"), "no such file", 4),
        (("--samples", held_out, "--set", "validation.limits.min_accuracy=0.5"), "no questions", 4),
    ):
        asked = ("convert", whole, "--bpw", "4", "--out", out, *QUICK, *wrong)
        for line in (run(*asked, "--dry-run", code=code), run(*asked, code=code)):
            assert says in line
    assert not out.exists()
