"""Compare our export of a checkpoint with that of llama.cpp's own converter, tensor by tensor and key by key.

    python experiments/compare_with_stock.py CHECKPOINT --llama-cpp FOLDER

FOLDER is a source tree of llama.cpp. Both write the text model and the projector in full precision; tensors must be
equal bit for bit, and every differing key must be listed in `EXPECTED` with a reason. Exit code 1 otherwise.
Values that are computed, not copied, may differ in their last bit (`COMPUTED`).

The stock converter reads fused experts in the layout of the public checkpoints only: of a folder that transformers 5
saved again, it writes experts of the wrong shape without a word. Give it the published one. Where it writes gate and up
of experts as one tensor, which llama.cpp reads, too, its halves are compared.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader, Keys, ReaderTensor
from rich.console import Console
from rich.table import Table

from experiment_command import command_parser
from external_program import run_program
from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.architectures.vision.moon_vit import column_and_row_halves
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.quantization.types import QUANT_TYPES

EXPECTED = {
    "general.quantized_by": "says which tool wrote the file",
    "general.base_model.count": "the checkpoint itself; stock writes what its model card says it is based on",
    "general.base_model.0.name": "as above",
    "general.base_model.0.organization": "as above",
    "general.base_model.0.repo_url": "as above",
    "clip.projector_type": "stock writes the one of the vision tower alone where there might be an audio tower",
    "clip.use_gelu": "Gemma 4's activation; stock leaves it out, and llama.cpp then takes gelu_quick",
    "GGUF.kv_count": "counts the keys below",
    "deepseek2.attention.q_lora_rank": "0: llama.cpp knows models without a low-rank query by their number of layers",
    "clip.vision.spatial_merge_size": "stock leaves GLM's to mtmd's default, the same 2",
    "GGUF.tensor_count": "counts the tensors below, and gate and up as two",
    "mistral4.attention.temperature_scale": "stock writes it for dense models only, llama.cpp reads it for these, too",
    "mistral4.attention.temperature_length": "as above",
    "v.token_embd.img_break": "stock leaves it out, and llama.cpp does not load a pixtral projector without",
}

COMPUTED = {"ssm_a": "minus exp; stock's float32 exp is off by one in the last place now and then"}
"""Ends of tensor names."""

CORRECTED: Final[Mapping[tuple[str, str], tuple[Callable[[np.ndarray, int], np.ndarray], str]]] = {
    ("internvl", r"v\.position_embd\.weight"): (
        lambda stock, heads: np.roll(stock, shift=-1, axis=1),
        "stock's, with the class token's row last, where llama.cpp has that token",
    ),
    ("kimivl", r"v\.blk\.\d+\.attn_[qk]\.(weight|bias)"): (
        lambda stock, heads: stock[column_and_row_halves(len(stock), heads)],
        "stock's, with channels of columns before channels of rows, as llama.cpp turns them",
    ),
}
"""By projector type and tensors' names: how ours comes from stock's and the number of heads where stock's is wrong."""
_HEADS: Final = Keys.ClipVision.Attention.HEAD_COUNT

_RUN_CONVERTER = """
import runpy, sys
from conversion.base import TextModel

pre_tokenizer, script = sys.argv[1:3]
by_hash = TextModel.get_vocab_base_pre

def by_hash_or_given(self, tokenizer):
    try:
        return by_hash(self, tokenizer)
    except NotImplementedError:
        return pre_tokenizer

TextModel.get_vocab_base_pre = by_hash_or_given
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""
"""Stock knows a pre-tokenizer by a hash over the vocabulary, and stops at one it has not met: name it there."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of the table; `reason` is empty for what nobody expects."""

    where: str
    ours: str
    stock: str
    reason: str = ""


def compare(ours: Path, stock: Path) -> Iterator[Difference]:
    """Differences between two GGUF files: keys, then tensors (set, type, shape, bytes)."""
    our_file, stock_file = GGUFReader(ours), GGUFReader(stock)
    our_keys, stock_keys = _keys(our_file), _keys(stock_file)
    for key in sorted(our_keys.keys() | stock_keys.keys()):
        found, wanted = our_keys.get(key), stock_keys.get(key)
        if found != wanted:
            yield Difference(key, _short(found), _short(wanted), EXPECTED.get(key, ""))
    our_tensors = {tensor.name: tensor for tensor in our_file.tensors}
    stock_tensors = dict(_unfused(stock_file.tensors, our_tensors))
    for name in sorted(our_tensors.keys() | stock_tensors.keys()):
        ours_, stock_ = our_tensors.get(name), stock_tensors.get(name)
        if _layout(ours_) != _layout(stock_):
            yield Difference(name, _layout(ours_), _layout(stock_), EXPECTED.get(name, ""))
        elif ours_ is not None and stock_ is not None and ours_.data.tobytes() != stock_.data.tobytes():
            reason = _corrected(name, ours_.data, stock_.data, our_keys)
            yield Difference(name, "other rows", "", reason) if reason else _other_values(name, ours_.data, stock_.data)


def _corrected(name: str, ours: np.ndarray, stock: np.ndarray, keys: Mapping[str, Any]) -> str:
    """Why ours has stock's rows in another order; empty where it has not."""
    found, heads = (keys.get(key, (None, None))[1] for key in (Keys.Clip.PROJECTOR_TYPE, _HEADS))
    for (projector, names), (correct, reason) in CORRECTED.items():
        if projector == found and re.fullmatch(names, name) and correct(stock, heads).tobytes() == ours.tobytes():
            return reason
    return ""


def _unfused(tensors: Sequence[ReaderTensor], wanted: Container[str]) -> Iterator[tuple[str, ReaderTensor]]:
    """By name; with gate and up of experts apart where ours has them so. llama.cpp takes both forms."""
    for tensor in tensors:
        parts = [tensor.name.replace("gate_up_exps", part) for part in ("gate_exps", "up_exps")]
        if tensor.name in wanted or parts[0] not in wanted:
            yield tensor.name, tensor
            continue
        width, rows, experts = tensor.shape.tolist()
        for name, half in zip(parts, np.split(tensor.data, 2, axis=1), strict=True):
            shape = np.array([width, rows // 2, experts], tensor.shape.dtype)
            yield name, tensor._replace(name=name, shape=shape, data=half)


def _other_values(name: str, ours: np.ndarray, stock: np.ndarray) -> Difference:
    if ours.dtype == np.float32:
        off = int(np.abs(ours.view(np.int32).astype(np.int64) - stock.view(np.int32)).max())
        reason = COMPUTED.get(name.rpartition(".")[2], "") if off == 1 else ""
        return Difference(name, "other values", f"at most {off} in the last place", reason)
    return Difference(name, "other values", "")


def convert_with_stock(
    source: Path, checkpoint: Path, out: Path, pre_tokenizer: str, *options: str, outtype: str = "f32"
) -> None:
    """Run the stock converter in a process of its own, with its own gguf package."""
    command = [sys.executable, "-c", _RUN_CONVERTER, pre_tokenizer, str(source / "convert_hf_to_gguf.py")]
    command += [str(checkpoint), "--outtype", outtype, "--outfile", str(out), *options]
    path = [str(source), str(source / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    run_program(*command, environment={"PYTHONPATH": os.pathsep.join(path)})


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--pre-tokenizer", default="qwen2", help="for a vocabulary the stock converter has not met")
    options = parser.parse_args()

    checkpoint = Checkpoint.open(options.checkpoint, options.pre_tokenizer)
    types = {t.name: QUANT_TYPES["F32"] for t in text_tensors(checkpoint) if t.role is not Role.KEEP}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
<<<<<<< HEAD
        write_text_model(folder / "text.gguf", checkpoint, types)
=======
        write_text_model(folder / "text.gguf", checkpoint, TensorPacking(types), pre_tokenizer=options.pre_tokenizer)
>>>>>>> main
        write_projector(folder / "projector.gguf", checkpoint, "F32")
        stock = (options.llama_cpp.resolve(), options.checkpoint.resolve())
        mtp = any("mtp" in name for name in find_family(checkpoint).ignored)
        left_out = ("--no-mtp",) if mtp else ()  # stock insists on the block
        convert_with_stock(*stock, folder / "stock-text.gguf", options.pre_tokenizer, *left_out)
        convert_with_stock(*stock, folder / "stock-projector.gguf", options.pre_tokenizer, "--mmproj")
        table = Table("file", "key or tensor", "ours", "stock", "reason", title=str(options.checkpoint))
        differences = [
            (file, difference)
            for file in ("text", "projector")
            for difference in compare(folder / f"{file}.gguf", folder / f"stock-{file}.gguf")
        ]
    for file, difference in differences:
        reason = difference.reason or "[red]unexpected[/red]"
        table.add_row(file, difference.where, difference.ours, difference.stock, reason)
    unexpected = sum(not difference.reason for _, difference in differences)
    console = Console()
    console.print(table)
    console.print(f"{unexpected} unexpected differences")
    return min(unexpected, 1)


def _keys(file: GGUFReader) -> dict[str, Any]:
    return {key: (field.types, field.contents()) for key, field in file.fields.items()}


def _layout(tensor: ReaderTensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.tensor_type.name} {tensor.shape.tolist()}"


def _short(entry: Any, width: int = 60) -> str:
    text = "absent" if entry is None else str(entry[1])
    return text if len(text) <= width else text[: width - 3] + "..."


if __name__ == "__main__":
    sys.exit(main())
