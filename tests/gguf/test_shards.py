"""Assignment of tensors to shards, and the shards' names."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.errors import UsageError
from mode_gguf.gguf.shards import MAX_SHARDS, assign_to_shards, earlier_shards, shard_paths, sibling_shards


def padded(n_bytes: int) -> int:
    """Bytes of a tensor in the file, padding included."""
    return n_bytes + -n_bytes % 32


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60), limit=st.integers(1, 20_000))
def test_every_tensor_is_in_one_shard_and_shards_are_as_full_as_they_can_be(sizes: list[int], limit: int) -> None:
    shards = assign_to_shards(sizes, limit)
    assert [index for shard in shards for index in shard] == list(range(len(sizes)))
    filled = [sum(padded(sizes[index]) for index in shard) for shard in shards]
    assert all(shard for shard in shards)
    assert all(total <= limit or len(shard) == 1 for total, shard in zip(filled, shards, strict=True))
    for (total, _), (_, following) in pairwise(zip(filled, shards, strict=True)):
        assert total + padded(sizes[following[0]]) > limit


def test_a_tensor_beyond_the_limit_has_a_shard_of_its_own() -> None:
    assert assign_to_shards([500, 32, 32, 500, 32], 64) == [range(1), range(1, 3), range(3, 4), range(4, 5)]


def test_more_shards_than_can_be_numbered() -> None:
    assert len(assign_to_shards([32] * MAX_SHARDS, 32)) == MAX_SHARDS
    with pytest.raises(UsageError, match=r"--shard-size of 32 bytes makes 65536 files.* give a larger size"):
        assign_to_shards([32] * (MAX_SHARDS + 1), 32)


def test_names_are_those_of_llama_cpp() -> None:
    paths = shard_paths(Path("out/M-3.00bpw-Q3_K_MODE.gguf"), 3)
    assert [path.name for path in paths] == [f"M-3.00bpw-Q3_K_MODE-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert sibling_shards(paths[0], 3) == paths
    assert sibling_shards(paths[0], 4) is None
    assert sibling_shards(paths[1], 3) is None
    assert sibling_shards(Path("out/M.gguf"), 3) is None
    assert shard_paths(Path("out/M.gguf"), 1) == [Path("out/M.gguf")]


def test_shards_of_other_runs_are_found_and_nothing_else(tmp_path: Path) -> None:
    shards = ["m-00001-of-00002.gguf", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf"]
    others = [
        "m.gguf",
        "mm-00001-of-00002.gguf",
        "m-1-of-2.gguf",
        "m-00001-of-00002.gguf.part",
        "m-x-00001-of-00002.gguf",
    ]
    for name in shards + others:
        (tmp_path / name).touch()
    assert [path.name for path in earlier_shards(tmp_path / "m.gguf")] == shards
    assert earlier_shards(tmp_path / "nowhere" / "m.gguf") == []
