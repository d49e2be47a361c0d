"""Text models in several files: in llama.cpp, byte by byte beside one file, and when something stops the writing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.text_model import TensorPacking, text_model_files, write_text_model
from mode_gguf.gguf.header import read_header
from mode_gguf.llama_cpp.engines import has_expert_groups
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.pipeline.stage_cache import StageCache, StageState
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from mode_gguf.validation.structure import check_structure, describe
from mode_gguf.workfolder import WorkFolder
from tests.export.uniform import all_in

SIZES = (10_000, 1_000_000, 4_000_000)
"""Shard sizes, from a file per tensor to a few files."""

Write = Callable[[int], list[Path]]


@pytest.fixture(scope="module")
def checkpoint(pico: Path) -> Checkpoint:
    return Checkpoint.open(pico)


@pytest.fixture(scope="module")
def types(checkpoint: Checkpoint) -> dict[str, QuantType]:
    return all_in(checkpoint, "Q8_0")


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, types: dict[str, QuantType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in one file."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_text_model(path, checkpoint, TensorPacking(types))
    return path


@pytest.fixture
def write(checkpoint: Checkpoint, types: dict[str, QuantType], tmp_path: Path) -> Write:
    """Writes the model in files of some size, and gives their paths, first one first."""
    path = tmp_path / "model.gguf"

    def write(shard_bytes: int) -> list[Path]:
        write_text_model(path, checkpoint, TensorPacking(types), shard_bytes=shard_bytes)
        return text_model_files(path, checkpoint, types, shard_bytes=shard_bytes)

    return write


def tensors_of(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("shard_bytes", SIZES)
def test_shards_hold_the_tensors_of_one_file(whole: Path, write: Write, tmp_path: Path, shard_bytes: int) -> None:
    files = write(shard_bytes)
    assert sorted(tmp_path.iterdir()) == files
    assert len(files) > 1
    expected = tensors_of(whole)
    parts = [tensors_of(file) for file in files]
    assert [name for part in parts for name in part] == list(expected)
    assert {name: tensor for part in parts for name, tensor in part.items()} == expected
    for part in parts:
        assert sum(len(data) for _, _, data in part.values()) <= shard_bytes or len(part) == 1


def test_keys_are_those_that_llama_cpp_reads(whole: Path, write: Write) -> None:
    files = write(1_000_000)
    split_types = {
        "split.no": GGUFValueType.UINT16,
        "split.count": GGUFValueType.UINT16,
        "split.tensors.count": GGUFValueType.INT32,
    }
    n_tensors = len(read_header(whole).tensors)
    for number, file in enumerate(files):
        fields = {key: field for key, field in GGUFReader(file).fields.items() if not key.startswith("GGUF.")}
        split = {key: fields.pop(key) for key in split_types}
        assert {key: field.types[0] for key, field in split.items()} == split_types
        assert [split[key].contents() for key in split_types] == [number, len(files), n_tensors]
        if number:
            assert not fields
        else:
            assert {key: field.contents() for key, field in fields.items()} == read_header(whole).metadata


@pytest.mark.parametrize("shard_bytes", SIZES[:2])
def test_llama_cpp_computes_the_same_from_shards(whole: Path, write: Write, shard_bytes: int) -> None:
    first = write(shard_bytes)[0]
    logits = []
    for path in (whole, first):
        with LlamaModel(path, threads=1, context=64) as model:
            logits.append(np.concatenate(list(model.text_logits(model.tokenize("Shards are read together.")))))
    np.testing.assert_array_equal(logits[1], logits[0])


def test_the_first_shard_stands_for_all(whole: Path, write: Write) -> None:
    files = write(1_000_000)
    description, of_whole = describe(files[0]), describe(whole)
    assert description["files"] == [str(file) for file in files]
    assert description["size_bytes"] == sum(file.stat().st_size for file in files)
    assert (description["bpw"], description["types"], description["n_weights"]) == tuple(
        of_whole[key] for key in ("bpw", "types", "n_weights")
    )
    kept = {name: QUANT_TYPES[info.type] for name, info in read_header(whole).tensors.items()}
    check_structure(files[0], kept)
    files[-1].unlink()
    with pytest.raises(InputError, match=rf"{files[-1].name}: cannot be read"):
        check_structure(files[0], kept)


def test_one_file_where_that_is_enough(whole: Path, write: Write, tmp_path: Path) -> None:
    assert write(10**9) == [tmp_path / "model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == whole.read_bytes()


def test_groups_of_experts_in_shards(checkpoint: Checkpoint, types: dict[str, QuantType], tmp_path: Path) -> None:
    names = ("Q3_K", "Q2_K", "Q3_K", "Q4_K")
    experts = {
        f"blk.0.ffn_{part}_exps.weight": [QUANT_TYPES[name] for name in names] for part in ("gate", "up", "down")
    }
    whole, split = tmp_path / "whole.gguf", tmp_path / "split.gguf"
    write_text_model(whole, checkpoint, TensorPacking(types, experts=experts))
    write_text_model(split, checkpoint, TensorPacking(types, experts=experts), shard_bytes=300_000)
    files = text_model_files(split, checkpoint, types, experts, 300_000)
    assert sorted(tmp_path.glob("split*")) == files
    assert {name: t for file in files for name, t in tensors_of(file).items()} == tensors_of(whole)
    assert has_expert_groups(read_header(files[0]).metadata)


def test_a_tensor_beyond_the_limit_is_said(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        write(10_000)
    assert [record.levelname for record in caplog.records if "tensors are not split" in record.message] == ["WARNING"]


def test_shards_of_another_number_are_removed(write: Write, tmp_path: Path) -> None:
    other = tmp_path / "other-00001-of-00002.gguf"
    other.touch()
    many = write(1_000_000)
    few = write(4_000_000)
    assert len(few) < len(many)
    assert sorted(tmp_path.iterdir()) == [*few, other]
    one = write(10**9)
    assert sorted(tmp_path.iterdir()) == [*one, other]


class TestStopped:
    """Before all shards are complete none has its name, and afterwards the first appears last."""

    def test_while_packing(
        self, checkpoint: Checkpoint, types: dict[str, QuantType], write: Write, tmp_path: Path
    ) -> None:
        older = {file: file.read_bytes() for file in write(1_000_000)}

        def stopped() -> Any:
            raise KeyboardInterrupt

        last = list(read_header(next(iter(older))).tensors)[-1]
        with pytest.raises(KeyboardInterrupt):
            write_text_model(
                tmp_path / "model.gguf", checkpoint, TensorPacking(types, packed={last: stopped}), shard_bytes=4_000_000
            )
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == older

    @pytest.mark.parametrize("renamed", [0, 1, 2])
    def test_between_renames(
        self,
        checkpoint: Checkpoint,
        types: dict[str, QuantType],
        write: Write,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        renamed: int,
    ) -> None:
        """Neither llama.cpp nor the ledger takes what is left for a model, though all had been there before."""
        folder = WorkFolder(tmp_path, "model")
        ledger = StageCache(folder)
        outputs = text_model_files(tmp_path / "model.gguf", checkpoint, types, None, 10**6)
        stage = StageState("export", {}, tuple(outputs))
        with ledger.recorded(stage):
            files = write(10**6)
        assert ledger.is_current(stage)
        assert len(files) > 3
        done: list[Path] = []
        replace: Callable[[Path, Path], Path] = Path.replace

        def stops(source: Path, target: Path) -> Path:
            if target.suffix != ".gguf":
                return replace(source, target)
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(target)
            return replace(source, target)

        monkeypatch.setattr(Path, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            write(10**6)
        assert done == files[::-1][:renamed]
        assert not files[0].exists()
        assert not ledger.is_current(stage)
        assert not list(tmp_path.glob("*.part"))
