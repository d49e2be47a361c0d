"""Compare calibration's counts and sums of squares with llama-imatrix's on the same text tokens.

    python experiments/check_against_stock_imatrix.py CHECKPOINT --llama-cpp FOLDER [--base-gguf F [--base-mmproj F]]

FOLDER holds llama-imatrix. The checkpoint is exported in F32, llama-imatrix reads a text with it, and our observers
see the same tokens in transformers. Counts of every expert must be identical and sums agree to 1e-3 of their norm; exit
code 1 otherwise. llama.cpp keeps its attention cache in F32 for it. A token whose router is all but undecided may
still go to different experts on the two sides: `--flips` allows so many per layer, and sums are compared only for
experts with equal counts.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from rich.console import Console
from rich.table import Table

from experiment_command import command_parser
from external_program import run_program
from mode_gguf.architectures import checkpoint_with_base, text_tensors
from mode_gguf.architectures.base_gguf import open_base
from mode_gguf.architectures.tensors import Role
from mode_gguf.calibration.observers import Observer
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.samples import load_samples
from mode_gguf.errors import InputError
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.forward.recorded import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.quantization.types import QUANT_TYPES

TOLERANCE = 1e-3


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder that holds llama-imatrix")
    parser.add_argument("--context", type=int, default=512, help="tokens per chunk")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--base-gguf", type=Path, help="of a checkpoint without a family")
    parser.add_argument("--base-mmproj", type=Path, help="its projector")
    parser.add_argument("--flips", type=int, default=0, help="routed tokens per layer that may differ")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    if arguments.base_gguf:
        checkpoint = checkpoint_with_base(checkpoint, open_base(arguments.base_gguf, arguments.base_mmproj))
    text = "\n\n".join(sample.text for sample in load_samples(max_image_samples=0) if sample.text is not None)
    with tempfile.TemporaryDirectory() as folder:
        stock = stock_imatrix(checkpoint, text, arguments, Path(folder))
    ours = our_sums(checkpoint, text, arguments.context, arguments.chunks)
    return report(checkpoint, stock, ours, arguments.flips)


def stock_imatrix(
    checkpoint: Checkpoint, text: str, arguments: argparse.Namespace, folder: Path
) -> dict[str, np.ndarray]:
    """Arrays of llama-imatrix's file: in_sum2 (E, n) and counts (E, 1) per tensor."""
    model, corpus, output = folder / "model-f32.gguf", folder / "text.txt", folder / "imatrix.gguf"
    types = {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint) if tensor.role is not Role.KEEP}
    write_text_model(model, checkpoint, TensorPacking(types))
    corpus.write_text(text, encoding="utf-8")
    command = [str(arguments.llama_cpp / "llama-imatrix"), "-m", str(model), "-f", str(corpus), "-o", str(output)]
    command += ["-c", str(arguments.context), "-b", str(arguments.context), "--chunks", str(arguments.chunks)]
    command += ["--process-output", "-ngl", "0", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    run_program(*command)
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(output).tensors}


def our_sums(checkpoint: Checkpoint, text: str, context: int, chunks: int) -> dict[str, np.ndarray]:
    """Calibration's arrays on the first `chunks` pieces of `context` tokens, each a sample of its own."""
    tokenizer = InputBuilder.open(checkpoint).tokenizer
    ids = torch.tensor(tokenizer(text, truncation=True, max_length=context * chunks)["input_ids"])
    if len(ids) < context * chunks:
        raise InputError(f"the text has {len(ids)} tokens, {context * chunks} are needed: lower --context or --chunks")
    pieces = ids.view(chunks, context)
    if ids[0] == tokenizer.bos_token_id:  # then llama-imatrix begins every chunk with it
        pieces[:, 0] = ids[0]
    nothing = torch.zeros(context, dtype=torch.bool)
    inputs = [
        ModelInputs(f"chunk {number}", piece, nothing, nothing, torch.arange(context - 1))
        for number, piece in enumerate(pieces)
    ]
    streamed = open_streamed(checkpoint, "cpu")
    observer = Observer(streamed.tensors, streamed.device)
    run_recorded(
        streamed,
        inputs,
        LayerConsumer(key_tokens=TEXT_ATTENTION, leave=observer.observe, finish=lambda layer: observer.finish_layer()),
        description="calibrating",
    )
    return observer.arrays


def report(checkpoint: Checkpoint, stock: dict[str, np.ndarray], ours: dict[str, np.ndarray], flips: int) -> int:
    """Print one line per tensor; 0 when all agree."""
    table = Table("tensor", "tokens", "moved", "sums off by")
    moved, worst = 0, 0.0
    tensors = [tensor for tensor in text_tensors(checkpoint) if tensor.activation is not None]
    for tensor in tensors:
        sums, counts = stock[f"{tensor.name}.in_sum2"], stock[f"{tensor.name}.counts"].reshape(-1)
        our_counts = ours[f"{tensor.activation}.count"].sum(axis=0)
        our_sums = ours[f"{tensor.activation}.sum2"].sum(axis=0)
        differ = int(np.abs(counts - our_counts).sum()) // 2 if len(counts) > 1 else int(abs(counts - our_counts).sum())
        equal = (counts == our_counts) & (our_counts > 0)
        gap = np.linalg.norm(sums.reshape(our_sums.shape) - our_sums, axis=1)
        relative = float((gap / np.maximum(np.linalg.norm(our_sums, axis=1), 1e-30))[equal].max(initial=0.0))
        moved = max(moved, differ)
        worst = max(worst, relative)
        table.add_row(tensor.name, str(int(our_counts.sum())), str(differ), f"{relative:.1e}")
    console = Console()
    console.print(table)
    passed = moved <= flips and worst <= TOLERANCE
    console.print(
        f"{len(tensors)} tensors, at most {moved} routed tokens of a layer elsewhere, sums within {worst:.1e}: "
        + ("equal" if passed else "DIFFERENT")
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
