"""Which files are the model: what transformers loads, unless something beside it contradicts that."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint
from mode_gguf.checkpoint.index import weight_files
from mode_gguf.errors import InputError
from tests.checkpoint.weights import changed_json, save, save_alone, weight_map, weights_of
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

SHARDS = tuple(f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
NAME = "model.language_model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico checkpoint, in two shards."""
    return shutil.copytree(pico, tmp_path / "checkpoint")


def equal(folder: Path, pico: Path) -> bool:
    """Whether a folder is read as the pico checkpoint is."""
    found, expected = Checkpoint.open(folder), Checkpoint.open(pico)
    return found.tensors.keys() == expected.tensors.keys() and all(
        np.array_equal(found.read(name), expected.read(name)) for name in expected.tensors
    )


def refused(folder: Path, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Checkpoint.open(folder)


def finetuned(folder: Path) -> None:
    weights = weights_of(folder)
    weights[NAME] = weights[NAME] * 1.5
    save(folder / SINGLE_FILE, weights)


def pruned(folder: Path) -> None:
    weights = weights_of(folder)
    del weights[HEAD]
    save(folder / SINGLE_FILE, weights)


def extended(folder: Path) -> None:
    save(folder / SINGLE_FILE, weights_of(folder) | {"more.weight": torch.zeros(2, 2)})


def in_float32(folder: Path) -> None:
    save(folder / SINGLE_FILE, {name: value.float() for name, value in weights_of(folder).items()})


def last_row(folder: Path) -> None:
    weights = weights_of(folder)
    weights[NAME][-1, -1] += 1
    save(folder / SINGLE_FILE, weights)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(
    ("write", "says"),
    [
        (finetuned, f"tensor {NAME} is another in {SHARDS[0]}"),
        (last_row, f"tensor {NAME} is another in {SHARDS[0]}"),
        (in_float32, r"tensor .* is another in model-\S+"),
        (pruned, f"only {SHARDS[1]} has tensor {HEAD}|only {SHARDS[0]} has tensor {HEAD}"),
        (extended, f"only {SINGLE_FILE} has tensor more.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_file_beside_shards_of_another_model(
    folder: Path, write: Callable[[Path], None], says: str, indexed: bool
) -> None:
    write(folder)
    if not indexed:
        (folder / INDEX_FILE).unlink()
    refused(folder, rf"hold different models \(({says})\); transformers loads {SINGLE_FILE}")


@pytest.mark.parametrize("left", [SHARDS, SHARDS[:1], ()])
def test_one_file_beside_its_own_shards_or_what_is_left_of_them(folder: Path, pico: Path, left: tuple[str]) -> None:
    save(folder / SINGLE_FILE, weights_of(folder))
    for shard in set(SHARDS) - set(left):
        (folder / shard).unlink()
    assert equal(folder, pico)
    assert {path.name for path in Checkpoint.open(folder).files} == {SINGLE_FILE}


def test_one_file_where_shards_are_gone_is_what_transformers_loads(folder: Path) -> None:
    finetuned(folder)
    for shard in SHARDS:
        (folder / shard).unlink()
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()[NAME].numpy()
    ours = (Checkpoint.open(folder).read(NAME).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(ours, theirs)


def test_one_file_that_the_index_names_is_one_of_its_shards(folder: Path, pico: Path) -> None:
    (folder / SHARDS[0]).rename(folder / SINGLE_FILE)
    renamed = {name: file.replace(SHARDS[0], SINGLE_FILE) for name, file in weight_map(folder).items()}
    changed_json(folder / INDEX_FILE, weight_map=renamed)
    assert equal(folder, pico)


@pytest.mark.parametrize("separator", ["-", ".safetensors-"])
def test_shards_without_an_index(folder: Path, pico: Path, separator: str) -> None:
    (folder / INDEX_FILE).unlink()
    for shard in SHARDS:
        (folder / shard).rename(folder / shard.replace("model-", f"model{separator}"))
    assert equal(folder, pico)


def test_some_shards_without_an_index(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    (folder / SHARDS[0]).unlink()
    refused(folder, rf"1 of 2 shards and no {INDEX_FILE} found")


def older_save(folder: Path, pico: Path, n: int = 3) -> None:
    """Shards of an older save beside the present ones."""
    older = write_pico_qwen3vlmoe(folder.parent / "older", seed=1, shards=n)
    for shard in older.glob("model-*.safetensors"):
        shutil.copy(shard, folder)


def test_two_sets_of_shards_without_an_index(folder: Path, pico: Path) -> None:
    older_save(folder, pico)
    (folder / INDEX_FILE).unlink()
    refused(folder, "shards of 2 and of 3 files found and no")


def test_shards_that_the_index_does_not_name(folder: Path, pico: Path, caplog: pytest.LogCaptureFixture) -> None:
    older_save(folder, pico)
    assert equal(folder, pico)
    assert "3 shards that model.safetensors.index.json does not name are not read" in caplog.text


def test_tensors_that_the_index_forgets_are_read(folder: Path, pico: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = weight_map(folder)
    changed_json(folder / INDEX_FILE, weight_map={name: listed[name] for name in listed if name != HEAD})
    assert equal(folder, pico)
    assert f"names {len(listed) - 1} of the {len(listed)} tensors in its shards" in caplog.text


def test_a_tensor_in_another_shard_than_the_index_says(folder: Path, pico: Path) -> None:
    swapped = dict(zip(SHARDS, reversed(SHARDS), strict=True))
    changed_json(folder / INDEX_FILE, weight_map={name: swapped[file] for name, file in weight_map(folder).items()})
    assert equal(folder, pico)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_shards(folder: Path, pico: Path, factor: int, indexed: bool) -> None:
    (other,) = set(SHARDS) - {weight_map(folder)[NAME]}
    inside = weights_of(folder)
    kept = {name: inside[name] for name, file in weight_map(folder).items() if file == other}
    save(folder / other, kept | {NAME: inside[NAME] * factor})
    if not indexed:
        (folder / INDEX_FILE).unlink()
    if factor == 1:
        assert equal(folder, pico)
    else:
        refused(folder, f"tensor {NAME} is another in model-.*shards of two saves are mixed")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"a.weight": "model.safetensors"}', "nonsense"])
def test_an_index_in_an_odd_form(folder: Path, content: str) -> None:
    (folder / INDEX_FILE).write_text(content)
    refused(folder, INDEX_FILE)


def test_an_index_that_is_a_folder(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    (folder / INDEX_FILE).mkdir()
    refused(folder, f"{INDEX_FILE}: a folder found, a JSON file expected")


def test_other_forms_beside_the_weights_change_nothing(folder: Path, pico: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "optimizer.pt", "vision_tower.safetensors"):
        (folder / name).write_bytes(b"not read")
    assert equal(folder, pico)


def test_an_index_beside_consolidated_files_alone(folder: Path) -> None:
    for shard in SHARDS:
        (folder / shard).rename(folder / shard.replace("model", "consolidated"))
    refused(folder, f"{SHARDS[0]}: shard listed in {INDEX_FILE} is missing")


def test_double_precision_is_rounded(folder: Path) -> None:
    weights = weights_of(folder)
    weights[NAME] = torch.full_like(weights[NAME], 0.1, dtype=torch.float64)
    save_alone(folder, weights)
    found = Checkpoint.open(folder).read(NAME)
    assert found.dtype == np.float32
    assert (found == np.float32(0.1)).all()
    weights[NAME][3, 4] = 1e300
    save_alone(folder, weights)
    with pytest.raises(InputError, match=rf"{NAME} is infinite at row 3, column 4"):
        Checkpoint.open(folder).read(NAME)


@pytest.mark.parametrize(
    ("names", "listed", "expected"),
    [
        ([*SHARDS, "a.json"], SHARDS, [*SHARDS]),
        ([*SHARDS, SINGLE_FILE], SHARDS, [SINGLE_FILE]),
        ([SHARDS[1], SINGLE_FILE], [SINGLE_FILE, SHARDS[1]], [SHARDS[1], SINGLE_FILE]),
        ([SHARDS[1], SHARDS[0]], [], [*SHARDS]),
        ([SHARDS[1]], [], []),
        ([SINGLE_FILE], [], [SINGLE_FILE]),
        (["pytorch_model.bin"], [], []),
    ],
)
def test_files_of_a_repository(names: list[str], listed: list[str], expected: list[str]) -> None:
    assert weight_files(names, listed) == expected
