"""Compare llama.cpp's predictions with transformers', both in F32, on a checkpoint's own held-out samples.

    python experiments/compare_with_transformers.py demo/Demo-VL-MoE --samples demo/heldout

The checkpoint is exported in F32, loaded in the embedded llama.cpp with an F32 cache and without flash attention, and
asked for full-vocabulary logits on texts and on answers about pictures. Exit code 1 when the mean KL divergence of
either is not below 1e-6 nats.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForImageTextToText

from experiment_command import add_held_out, command_parser
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.questions import HeldOutSet, load_held_out
from mode_gguf_cli.console import log_to_stderr, progress, stdout

LIMIT = 1e-6


def main() -> int:
    """Export, compare, print."""
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    add_held_out(parser)
    parser.add_argument("--count", type=int, default=24, help="texts, and questions with an answer, to compare on")
    arguments = parser.parse_args()
    log_to_stderr()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    held_out = load_held_out(arguments.samples)
    with tempfile.TemporaryDirectory() as folder:
        text, mmproj = Path(folder) / "text.gguf", Path(folder) / "mmproj.gguf"
        write_text_model(
            text, checkpoint, TensorPacking({tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint)})
        )
        write_projector(mmproj, checkpoint, "F32")
        divergences = measure(checkpoint, text, mmproj, held_out, arguments.count)
    table = Table("", "positions", "mean KL", "largest KL")
    for name, kl in divergences.items():
        table.add_row(name, str(len(kl)), f"{kl.mean():.1e}", f"{kl.max():.1e}")
    stdout.print(table)
    return int(any(kl.mean() >= LIMIT for kl in divergences.values()))


@torch.no_grad()
def measure(
    checkpoint: Checkpoint, text: Path, mmproj: Path, held_out: HeldOutSet, count: int
) -> dict[str, np.ndarray]:
    """KL divergence of llama.cpp from transformers at every scored position, of texts and of image answers."""
    builder = InputBuilder.open(checkpoint)
    reference = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    questions = [question for question in held_out.questions if question.answer][:count]
    texts = held_out.texts[:count]
    found: dict[str, list[np.ndarray]] = {"text": [], "image": []}

    def predicted(sample: Sample) -> tuple[np.ndarray, list[int]]:
        inputs = builder.build(sample)
        logits = reference(**inputs.model_arguments(torch.device("cpu"), torch.float32)).logits[0]
        return logits[inputs.scored].numpy(), inputs.input_ids[inputs.scored + 1].tolist()

    with (
        LlamaModel(text, mmproj, exact=True) as model,
        progress().step("comparing", len(texts) + len(questions)) as advance,
    ):
        for passage in texts:
            expected, tokens = predicted(Sample("text", held_out.name, text=passage))
            logits = model.text_logits(model.tokenize(passage))[: len(tokens)]
            found["text"].append(compare(expected, logits, tokens).kl)
            advance(1)
        for question in questions:
            chat = (Message("user", question.question), Message("assistant", str(question.answer)))
            expected, tokens = predicted(Sample("question", held_out.name, messages=chat, image=question.image))
            prompt = model.chat_template.question(question.question, model.image_marker)
            logits = model.logits(prompt, tokens, question.image)
            found["image"].append(compare(expected, logits, tokens).kl)
            advance(1)
    return {name: np.concatenate(parts) for name, parts in found.items()}


if __name__ == "__main__":
    sys.exit(main())
