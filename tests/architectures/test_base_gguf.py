"""A base GGUF beside the checkpoint it was made from, and beside others."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from mode_gguf.architectures import checkpoint_with_base, find_family, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.projector import write_projector
from mode_gguf.gguf.header import read_header
from tests.base_gguf import open_base, permuted_rows, write_family_base, write_olmoe_base
from tests.export.uniform import write_all_in
from tests.families.changed import changed
from tests.families.pico.base import write_pico_olmoe
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def olmoe(folder: Path) -> Checkpoint:
    return Checkpoint.open(write_pico_olmoe(folder / "olmoe"))


@pytest.fixture(scope="module")
def family(folder: Path, pico: Path) -> tuple[Checkpoint, Path, Path]:
    checkpoint = Checkpoint.open(pico)
    return checkpoint, *write_family_base(checkpoint, folder)


def test_tensors_are_those_of_the_family(family: tuple[Checkpoint, Path, Path]) -> None:
    checkpoint, text, projector = family
    based = checkpoint_with_base(checkpoint, open_base(text, projector))
    assert based.fingerprint != checkpoint.fingerprint
    assert based.base is not None
    assert based.base.unmatched == ()
    ours = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    found = text_tensors(based)
    assert [tensor.name for tensor in found] == list(ours)
    for tensor in found:
        known = ours[tensor.name]
        assert (tensor.shape, tensor.role, tensor.layer, tensor.projection, tensor.activation) == (
            known.shape,
            known.role,
            known.layer,
            known.projection,
            known.activation,
        )
        if tensor.role is Role.DENSE:
            assert tensor.sources == known.sources
        last = tensor.n_experts - 1
        np.testing.assert_array_equal(as_float32(tensor.read(last)), as_float32(known.read(last)))
        if len(tensor.shape) > 1:
            some = slice(1, 3)
            np.testing.assert_array_equal(as_float32(tensor.read(0, some)), as_float32(known.read(0, some)))
    assert {t.name: t.role for t in projector_tensors(based)} == {t.name: t.role for t in projector_tensors(checkpoint)}
    assert find_family(based).projector_type == find_family(checkpoint).projector_type


def test_a_file_made_from_a_base_is_the_base_again(family: tuple[Checkpoint, Path, Path], tmp_path: Path) -> None:
    checkpoint, text, projector = family
    based = checkpoint_with_base(checkpoint, open_base(text, projector))
    write_all_in(tmp_path / "text.gguf", based, "BF16")
    write_projector(tmp_path / "projector.gguf", based)
    for made, original in ((tmp_path / "text.gguf", text), (tmp_path / "projector.gguf", projector)):
        ours, theirs = GGUFReader(made), GGUFReader(original)
        assert {k: (f.types, f.contents()) for k, f in ours.fields.items()} == {
            k: (f.types, f.contents()) for k, f in theirs.fields.items()
        }
        assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
        for one, other in zip(ours.tensors, theirs.tensors, strict=True):
            assert one.tensor_type == other.tensor_type
            assert one.data.tobytes() == other.data.tobytes()


def test_shards_are_one_base(family: tuple[Checkpoint, Path, Path], tmp_path: Path) -> None:
    checkpoint, text, projector = family
    write_all_in(tmp_path / "pico-BF16.gguf", checkpoint, "BF16", shard_bytes=3_000_000)
    first, *others = sorted(tmp_path.glob("*.gguf"))
    assert len(others) > 2
    split, whole = open_base(first, projector), open_base(text, projector)
    assert (split.name, len(split.files)) == ("pico", len(others) + 2)
    assert [tensor.name for tensor in split.tensors] == [tensor.name for tensor in whole.tensors]
    based = checkpoint_with_base(checkpoint, split)
    np.testing.assert_array_equal(text_tensors(based)[-1].read(0), whole.tensors[-1].read(0))
    write_all_in(tmp_path / "out.gguf", based, "Q8_0")
    assert not any(key.startswith("split.") for key in read_header(tmp_path / "out.gguf").metadata)


def test_keys_keep_their_types(olmoe: Checkpoint, folder: Path, tmp_path: Path) -> None:
    base = open_base(write_olmoe_base(olmoe.path, folder / "typed-BF16.gguf"))
    assert base.name == "typed"
    based = checkpoint_with_base(None, base)
    write_all_in(tmp_path / "text.gguf", based, "Q8_0")
    before, after = base.text, read_header(tmp_path / "text.gguf")
    for key in ("olmoe.of_bytes", "olmoe.a_byte", "tokenizer.ggml.tokens", "olmoe.rope.freq_base"):
        assert (after.metadata[key], after.value_types[key]) == (before.metadata[key], before.value_types[key])
    assert after.metadata["general.quantized_by"] == "mode-gguf"
    assert after.metadata["general.file_type"] == 7


def test_experts_one_by_one_and_dense_matrices_are_found(olmoe: Checkpoint, folder: Path) -> None:
    base = open_base(write_olmoe_base(olmoe.path, folder / "olmoe-BF16.gguf"))
    based = checkpoint_with_base(olmoe, base)
    by_name = {tensor.name: tensor for tensor in text_tensors(based)}
    assert based.base is not None
    assert based.base.unmatched == ()
    assert by_name["blk.1.attn_q.weight"].sources == ("model.layers.1.self_attn.q_proj.weight",)
    assert by_name["blk.1.attn_q.weight"].order is None
    assert by_name["output.weight"].sources == ("lm_head.weight",)
    assert by_name["blk.0.ffn_gate_inp.weight"].role is Role.KEEP
    assert by_name["blk.2.ffn_down_exps.weight"].activation == "blk.2.ffn_exps.hidden"
    again = pickle.loads(pickle.dumps(based))  # other processes are sent it
    np.testing.assert_array_equal(text_tensors(again)[3].read(0), text_tensors(based)[3].read(0))


def test_rows_may_be_in_another_order_and_columns_may_not(olmoe: Checkpoint, folder: Path) -> None:
    path = write_olmoe_base(olmoe.path, folder / "moved-BF16.gguf", permute=True, swap_columns=True)
    based = checkpoint_with_base(olmoe, open_base(path))
    by_name = {tensor.name: tensor for tensor in text_tensors(based)}
    for name in ("blk.0.attn_q.weight", "blk.2.attn_k.weight"):
        tensor = by_name[name]
        assert tensor.order is not None
        assert tensor.order.rows is not None
        np.testing.assert_array_equal(tensor.order.rows, permuted_rows(tensor.shape[0]))
        np.testing.assert_array_equal(tensor.read(0), olmoe.read(tensor.sources[0])[tensor.order.rows])
    assert based.base is not None
    assert based.base.unmatched == tuple(f"blk.{layer}.attn_output.weight" for layer in range(3))
    assert by_name["blk.0.attn_output.weight"].activation is None


def other_weights(olmoe: Path, folder: Path) -> Checkpoint:
    return Checkpoint.open(write_pico_olmoe(folder, seed=1))


def other_expert(olmoe: Path, folder: Path) -> Checkpoint:
    from safetensors.torch import load_file, save_file

    shutil.copytree(olmoe, folder)
    stored = load_file(olmoe / "model.safetensors")
    stored["model.layers.2.mlp.experts.3.up_proj.weight"] *= 2
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "weights of token_embd.weight and model.embed_tokens.weight differ"),
        (other_expert, "blk.2.ffn_up_exps.weight, expert 3: weights differ"),
        (partial(changed, num_hidden_layers=5), "layers 3 there, 5 here"),
        (partial(changed, num_experts=8), "experts per layer: 4 there, 8 here"),
        (partial(changed, hidden_size=512), "a hidden size of 256 there, 512 here"),
    ],
)
def test_the_base_of_another_model_is_refused(
    change: Callable[[Path, Path], Checkpoint], message: str, olmoe: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    base = open_base(write_olmoe_base(olmoe.path, folder / "olmoe-BF16.gguf"))
    with pytest.raises(InputError, match=message):
        checkpoint_with_base(change(olmoe.path, tmp_path / "other"), base)


def test_what_is_no_base_is_refused(family: tuple[Checkpoint, Path, Path], tmp_path: Path) -> None:
    checkpoint, text, projector = family
    write_all_in(tmp_path / "packed.gguf", checkpoint, "Q8_0")
    with pytest.raises(InputError, match=r"packed.gguf: tensor \S+ has type Q8_0; expected a base in full precision"):
        open_base(tmp_path / "packed.gguf")
    with pytest.raises(InputError, match="a projector found, expected the text model's file"):
        open_base(projector)
    with pytest.raises(InputError, match="is 'qwen3vlmoe', expected 'clip'"):
        open_base(text, text)
    with pytest.raises(InputError, match="names a vision encoder; make its projector"):
        checkpoint_with_base(checkpoint, open_base(text))


def test_missing_experts_are_named(olmoe: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_olmoe_base(olmoe.path, folder / "olmoe-BF16.gguf")
    header = read_header(path)
    for left_out, message in (("_up_exps", "layer 0 has experts' down, gate alone"), ("_exps", "no routed experts")):
        kept = {name: info for name, info in header.tensors.items() if left_out not in name}
        found = replace(header, tensors=kept)
        monkeypatch.setattr("mode_gguf.architectures.base_gguf.files.read_header", lambda _, found=found: found)
        with pytest.raises(InputError, match=message):
            open_base(path)


def test_a_supported_checkpoint_of_other_seeds_is_another_model(folder: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(write_pico_qwen3vlmoe(tmp_path / "first"))
    second = Checkpoint.open(write_pico_qwen3vlmoe(tmp_path / "second", seed=5))
    text, projector = write_family_base(first, tmp_path)
    with pytest.raises(InputError, match="differ; convert this checkpoint"):
        checkpoint_with_base(second, open_base(text, projector))
