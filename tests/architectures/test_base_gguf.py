"""A base GGUF beside the checkpoint it was made from, and beside others."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

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


def other(name: str, rows: slice = slice(None)) -> Callable[[Path, Path], Checkpoint]:
    """A copy in which some rows of a tensor are a little larger."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name][rows] *= 1.01

    return partial(edited, change)


def edited(change: Callable[[dict[str, torch.Tensor]], None], olmoe: Path, folder: Path) -> Checkpoint:
    shutil.copytree(olmoe, folder)
    stored = load_file(olmoe / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


def other_token(olmoe: Path, folder: Path) -> Checkpoint:
    shutil.copytree(olmoe, folder)
    text = (olmoe / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|begin|>"), encoding="utf-8")
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "weights of token_embd.weight and model.embed_tokens.weight differ"),
        (other("model.embed_tokens.weight", slice(77, 78)), "weights of token_embd.weight and model.embed_tokens"),
        (other("model.layers.2.mlp.experts.3.up_proj.weight"), "blk.2.ffn_up_exps.weight, expert 3: weights differ"),
        (other("model.layers.1.mlp.experts.2.down_proj.weight"), "blk.1.ffn_down_exps.weight, expert 2: weights"),
        (other("model.layers.1.self_attn.q_proj.weight"), "weights of blk.1.attn_q.weight and .*q_proj.weight differ"),
        (other("model.layers.2.self_attn.o_proj.weight", slice(9, 10)), "weights of blk.2.attn_output.weight and"),
        (other("model.layers.0.mlp.gate.weight"), "weights of blk.0.ffn_gate_inp.weight and"),
        (other("model.layers.0.self_attn.k_norm.weight"), "weights of blk.0.attn_k_norm.weight and"),
        (other("model.norm.weight"), "weights of output_norm.weight and model.norm.weight differ"),
        (other("lm_head.weight", slice(5, 6)), "weights of output.weight and lm_head.weight differ"),
        (partial(changed, num_experts_per_tok=1), "experts per token: 2 there, 1 here"),
        (partial(changed, rope_parameters={"rope_theta": 5e5}), "rope_theta 10000 there, 500000 here"),
        (
            partial(changed, rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}),
            "rope_scaling factor 1 there, 4 here",
        ),
        (other_token, 'is "<|im_start|>" there, "<|begin|>" here'.replace("|", "[|]")),
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


def test_no_more_than_other_orders_and_forms_is_allowed(olmoe: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """Q, K and V merged, norms centred on 0, heads tied: what converters write, and the same of other weights."""
    whole = write_olmoe_base(olmoe.path, folder / "olmoe-BF16.gguf", permute=True)

    def centred(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"].float() - 1

    def merged(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            place = f"model.layers.{layer}.self_attn"
            parts = [weights.pop(f"{place}.{part}_proj.weight") for part in "qkv"]
            weights[f"{place}.qkv_proj.weight"] = torch.cat(parts)

    def merged_otherwise(weights: dict[str, torch.Tensor]) -> None:
        merged(weights)
        weights["model.layers.1.self_attn.qkv_proj.weight"][3] *= 1.01

    def without_head(weights: dict[str, torch.Tensor]) -> None:
        del weights["lm_head.weight"]

    def tied(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    for number, change in enumerate((centred, merged)):
        same = edited(change, olmoe.path, tmp_path / str(number))
        assert checkpoint_with_base(same, open_base(whole)).base is not None
    for change, message in (
        (merged_otherwise, "weights of blk.1.attn_q.weight and model.layers.1.self_attn.qkv_proj.weight differ"),
        (without_head, "output.weight is not the embedding, which is the output head here"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint_with_base(edited(change, olmoe.path, tmp_path / change.__name__), open_base(whole))
    own = edited(tied, olmoe.path, tmp_path / "tied")
    base = open_base(write_olmoe_base(own.path, tmp_path / "tied-BF16.gguf"))
    assert checkpoint_with_base(edited(without_head, own.path, tmp_path / "without"), base).base is not None
    shared = {name: info for name, info in base.text.tensors.items() if name != "output.weight"}
    base = replace(base, text=replace(base.text, tensors=shared), tensors=base.tensors[:-1])
    assert checkpoint_with_base(own, base).base is not None
    with pytest.raises(InputError, match=r"the embedding is the output head there, lm_head.weight is another here"):
        checkpoint_with_base(olmoe, base)


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
