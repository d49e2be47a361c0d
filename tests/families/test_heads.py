"""Output heads beside a setting that ties embeddings, as transformers 5 takes them; and heads that are missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.rules import EMBEDDING, OUTPUT
from mode_gguf.architectures.tensors import Role, as_float32
from mode_gguf.checkpoint.folder import SINGLE_FILE, Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.forward.streaming import open_streamed
from tests.families.cases import every_layout
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase


def copied(folder: Path, target: Path, *, tied: bool | None) -> Path:
    """A copy in one file, whose config.json says on both levels whether embeddings are tied; None says nothing."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    save_file(weights, target / SINGLE_FILE, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    sections = [config, *(config[name] for name in ("text_config", "llm_config") if name in config)]
    for section in sections:
        section.pop("tie_word_embeddings", None)
        if tied is not None:
            section["tie_word_embeddings"] = tied
    (target / "config.json").write_text(json.dumps(config))
    return target


def names_of(checkpoint: Checkpoint) -> tuple[str, str]:
    """Names of the embedding and the head."""
    layout = find_family(checkpoint).layout
    return layout.stored_name(EMBEDDING.source), layout.stored_name(OUTPUT.source)


def with_head(folder: Path, head: str, change: torch.Tensor | None) -> None:
    weights = load_file(folder / SINGLE_FILE)
    weights.pop(head, None)
    if change is not None:
        weights[head] = change.contiguous()
    save_file(weights, folder / SINGLE_FILE, {"format": "pt"})


@every_layout
def test_a_head_that_differs_is_kept(case: FamilyCase, layout: str, families: Families, tmp_path: Path) -> None:
    folder = copied(families.checkpoint(layout).path, tmp_path / "tied", tied=True)
    embedding, head = names_of(Checkpoint.open(folder))
    other = load_file(folder / SINGLE_FILE)[embedding].flip(0)
    with_head(folder, head, other)
    checkpoint = Checkpoint.open(folder)
    (output,) = (tensor for tensor in text_tensors(checkpoint) if tensor.role is Role.OUTPUT)
    np.testing.assert_array_equal(as_float32(output.read(0)), other.float().numpy())
    model = open_streamed(checkpoint, "cpu").model
    assert torch.equal(model.get_output_embeddings().weight, other.float())  # type: ignore[operator]
    assert torch.equal(model.get_input_embeddings().weight, other.float().flip(0))  # type: ignore[operator]


@every_layout
def test_an_equal_head_is_tied(case: FamilyCase, layout: str, families: Families, tmp_path: Path) -> None:
    folder = copied(families.checkpoint(layout).path, tmp_path / "tied", tied=True)
    embedding, head = names_of(Checkpoint.open(folder))
    with_head(folder, head, load_file(folder / SINGLE_FILE)[embedding].clone())
    assert not [tensor for tensor in text_tensors(Checkpoint.open(folder)) if tensor.role is Role.OUTPUT]


@every_layout
def test_no_head_and_no_ties_are_refused(case: FamilyCase, layout: str, families: Families, tmp_path: Path) -> None:
    folder = copied(families.checkpoint(layout).path, tmp_path / "untied", tied=False)
    _, head = names_of(Checkpoint.open(folder))
    with_head(folder, head, None)
    with pytest.raises(InputError, match=rf"{head} is missing .*tie_word_embeddings"):
        text_tensors(Checkpoint.open(folder))


@every_layout
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_another_shape_is_refused(
    case: FamilyCase, layout: str, tied: bool, families: Families, tmp_path: Path
) -> None:
    folder = copied(families.checkpoint(layout).path, tmp_path / "other", tied=tied)
    embedding, head = names_of(Checkpoint.open(folder))
    with_head(folder, head, load_file(folder / SINGLE_FILE)[embedding][:-1].clone())
    with pytest.raises(InputError, match=rf"tensor {head} has shape .*expected that of {embedding}"):
        text_tensors(Checkpoint.open(folder))


@pytest.mark.parametrize("value", ["true", 1, []])
def test_a_setting_that_is_no_truth_is_refused(pico: Path, tmp_path: Path, value: object) -> None:
    folder = shutil.copytree(pico, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": value}))
    with pytest.raises(InputError, match=r"tie_word_embeddings is .*expected bool"):
        text_tensors(Checkpoint.open(folder))
