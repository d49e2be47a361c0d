"""Latent attention: what becomes of kv_b_proj, against what the matrix is for."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import Keys
from safetensors.numpy import save_file

from mode_gguf.architectures.hparams import text_hparams
from mode_gguf.architectures.tensors import ALL_ROWS, Role
from mode_gguf.architectures.text import mla
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

HEADS, NOPE, VALUE, LATENT, ROTATED, LAYERS = 3, 4, 6, 5, 2, 7
SOURCE = "layers.0.self_attn.kv_b_proj.weight"
TEXT = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROTATED,
    "v_head_dim": VALUE,
    "kv_lora_rank": LATENT,
}


def written(folder: Path, rows: int = HEADS * (NOPE + VALUE), **settings: object) -> Checkpoint:
    weights = np.random.default_rng(0).standard_normal((rows, LATENT), np.float32)
    save_file({SOURCE: weights}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"text_config": {**TEXT, **settings}}), encoding="utf-8")
    return Checkpoint.open(folder)


def test_halves_do_per_head_what_the_whole_does(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    keys, values = mla.absorbed_keys(checkpoint, SOURCE), mla.absorbed_values(checkpoint, SOURCE)
    assert (keys.shape, values.shape) == ((HEADS, LATENT, NOPE), (HEADS, VALUE, LATENT))
    latent, query = np.random.default_rng(1).standard_normal((2, HEADS * NOPE))
    expanded = (checkpoint.read(SOURCE) @ latent[:LATENT]).reshape(HEADS, NOPE + VALUE)
    for head, q in enumerate(query.reshape(HEADS, NOPE)):
        assert q @ expanded[head, :NOPE] == pytest.approx(keys.read(0)[head] @ q @ latent[:LATENT])
        np.testing.assert_allclose(values.read(0)[head] @ latent[:LATENT], expanded[head, NOPE:])


@pytest.mark.parametrize("rows", [ALL_ROWS, slice(1, 3), slice(2, 9)])
def test_some_heads(tmp_path: Path, rows: slice) -> None:
    checkpoint = written(tmp_path)
    for view in (mla.absorbed_keys(checkpoint, SOURCE), mla.absorbed_values(checkpoint, SOURCE)):
        some = view.read(0, rows)
        np.testing.assert_array_equal(some, view.read(0)[rows])
        assert some.flags.c_contiguous


def test_roles_and_names() -> None:
    rules = {rule.name.removeprefix("blk.{layer}."): rule for rule in mla.RULES}
    absorbed = {name for name, rule in rules.items() if rule.role is Role.ABSORBED}
    assert absorbed == {f"{part}.weight" for part in mla.ABSORBED_PARTS}
    assert all(rules[name].activation is None for name in absorbed)
    dense = {name for name, rule in rules.items() if rule.role is Role.DENSE}
    assert dense == {f"attn_{part}.weight" for part in ("q", "q_a", "q_b", "kv_a_mqa", "output")}


@pytest.mark.parametrize("rank", [None, 16])
def test_queries_of_one_matrix_or_two(tmp_path: Path, rank: int | None) -> None:
    checkpoint = written(tmp_path, q_lora_rank=rank)
    text = text_hparams(checkpoint)
    found = {name: len(list(layers)) for name, layers in mla.subsets(text).items()}
    assert found == {mla.LOW_RANK_QUERY: LAYERS if rank else 0, mla.FULL_QUERY: 0 if rank else LAYERS}
    keys = mla.keys(text)
    assert keys.get(Keys.Attention.Q_LORA_RANK) == rank
    assert keys[Keys.Attention.KEY_LENGTH] == LATENT + ROTATED
    assert keys[Keys.Attention.KEY_LENGTH_MLA] == NOPE + ROTATED


def test_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, rows=7)
    with pytest.raises(InputError, match=r"kv_b_proj\.weight has shape \[7, 5\], expected \[30, 5\]"):
        mla.absorbed_keys(checkpoint, SOURCE)
