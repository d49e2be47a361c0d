"""Measure what the demo checkpoint is for: what uniform Q2_K experts cost, on text and on picture answers.

Everything goes through transformers' own classes on the written checkpoint, not through the training forward.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

Q2_K, BLOCK, BLOCK_BYTES = 10, 256, 84


def _ggml() -> ctypes.CDLL:
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("the evaluation needs the xllamacpp wheel, which carries ggml")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        integer,
        integer,
        integer,
        pointer,
    ]
    library.dequantize_row_q2_K.argtypes = [pointer, pointer, integer]
    library.dequantize_row_q2_K.restype = None
    return library


def q2_k(weights: Tensor) -> Tensor:
    """The weights after a round trip through Q2_K along the last dimension, without importance matrix."""
    library = _ggml()
    x: NDArray[np.float32] = np.ascontiguousarray(weights.detach().cpu().float().numpy().reshape(-1, weights.shape[-1]))
    packed = np.zeros((x.shape[0], x.shape[1] // BLOCK * BLOCK_BYTES), np.uint8)
    library.ggml_quantize_chunk(Q2_K, x.ctypes.data, packed.ctypes.data, 0, x.shape[0], x.shape[1], None)
    library.dequantize_row_q2_K(packed.ctypes.data, x.ctypes.data, x.size)
    return torch.from_numpy(x.reshape(weights.shape)).to(weights)


@contextmanager
def experts_at_q2_k(model: Any) -> Iterator[None]:
    """Every expert tensor at Q2_K inside the context; the modules hold rows of inputs, as a GGUF does."""
    tensors = [p for name, p in model.named_parameters() if ".experts." in name]
    originals = [p.detach().clone() for p in tensors]
    for parameter in tensors:
        parameter.data.copy_(q2_k(parameter.data))
    try:
        yield
    finally:
        for parameter, original in zip(tensors, originals, strict=True):
            parameter.data.copy_(original)


@dataclass
class Sample:
    """Model inputs and the columns that are scored."""

    inputs: dict[str, Tensor]
    first_scored: int
    last_scored: int
    kind: str
    background: float = 0.0


class Loader:
    """Turns the files of a set into model inputs with the checkpoint's own tokenizer and image processor."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.config = json.loads((checkpoint / "config.json").read_text())

    def text(self, passage: str) -> Sample:
        """A passage; every token but the first is scored."""
        ids = self.tokenizer(passage, add_special_tokens=False, return_tensors="pt").input_ids
        return Sample({"input_ids": ids}, 1, ids.shape[1], "text")

    def question(self, row: dict[str, Any], folder: Path) -> Sample:
        """A picture and a question; the answer and the end of its turn are scored."""
        with Image.open(folder / row["image"]) as image:
            seen = self.processor(images=[image.convert("RGB")], return_tensors="pt")
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
        prompt = self.tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        n_tokens = int(seen["image_grid_thw"].prod()) // self.processor.merge_size**2
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * n_tokens)
        head = self.tokenizer(prompt, add_special_tokens=False).input_ids
        body = self.tokenizer(row["answer"] + "<|im_end|>", add_special_tokens=False).input_ids
        ids = torch.tensor([head + body])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == self.config["image_token_id"]).int(), **seen}
        return Sample(inputs, len(head), ids.shape[1], row["kind"], row.get("background", 0.0))


def load_sets(loader: Loader, folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Text samples and picture samples of the held-out folder."""
    texts = [loader.text(json.loads(line)["text"]) for line in (folder / "text.jsonl").open(encoding="utf-8")]
    asked = [loader.question(json.loads(line), folder) for line in (folder / "questions.jsonl").open(encoding="utf-8")]
    return texts, asked


@torch.no_grad()
def predictions(model: Any, samples: list[Sample]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities at the scored tokens and the tokens themselves."""
    result = []
    for sample in samples:
        logits = model(**sample.inputs).logits[0].float()
        columns = slice(sample.first_scored, sample.last_scored)
        scores = functional.log_softmax(logits[sample.first_scored - 1 : sample.last_scored - 1], -1)
        result.append((scores, sample.inputs["input_ids"][0, columns]))
    return result


def divergence(reference: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]], drop_last: int = 0) -> float:
    """Mean KL(reference || other) per scored token, in nats."""
    terms = []
    for (p, _), (q, _) in zip(reference, other, strict=True):
        kl = (p.exp() * (p - q)).sum(-1)
        terms.append(kl[: kl.shape[0] - drop_last])
    return float(torch.cat(terms).mean())


def cross_entropy(scored: list[tuple[Tensor, Tensor]]) -> float:
    """Mean negative log-likelihood per scored token."""
    return float(torch.cat([-p.gather(1, ids[:, None])[:, 0] for p, ids in scored]).mean())


def right_answers(scored: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether each answer is right to the letter; greedy decoding is right exactly if every argmax is."""
    return [bool((p.argmax(-1) == ids).all()) for p, ids in scored]


def exact(scored: list[tuple[Tensor, Tensor]], samples: list[Sample]) -> dict[str, float]:
    """Exact-match accuracy by kind and over all."""
    hits = defaultdict(list)
    for right, sample in zip(right_answers(scored), samples, strict=True):
        hits[sample.kind].append(right)
        hits["all"].append(right)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(hits.items())}


def changes(reference: list[bool], other: list[bool]) -> dict[str, float]:
    """Answers lost and won, and the two-sided p-value of the sign test that neither is the rule."""
    lost = sum(before and not after for before, after in zip(reference, other, strict=True))
    won = sum(after and not before for before, after in zip(reference, other, strict=True))
    tail = sum(math.comb(lost + won, i) for i in range(min(lost, won) + 1)) / 2 ** (lost + won)
    return {"lost": lost, "won": won, "p": min(1.0, 2 * tail)}


@torch.no_grad()
def routing_cosine(model: Any, texts: list[Sample], asked: list[Sample], image_token: int) -> list[float]:
    """Per layer, the cosine between how often experts are chosen for text and for vision tokens."""
    gates = [layer.mlp.gate for layer in model.model.language_model.layers]
    counts = np.zeros((len(gates), 2, gates[0].num_experts))
    current: dict[str, Tensor] = {}

    def hook(index: int) -> Any:
        def count(_module: Any, _inputs: Any, output: Any) -> None:
            chosen, vision = output[2], current["vision"]
            for modality in (0, 1):
                picked = chosen[vision == bool(modality)].reshape(-1)
                counts[index, modality] += torch.bincount(picked, minlength=counts.shape[2]).numpy()

        return count

    handles = [gate.register_forward_hook(hook(i)) for i, gate in enumerate(gates)]
    for sample in texts + asked:
        current["vision"] = sample.inputs["input_ids"].reshape(-1) == image_token
        model(**sample.inputs)
    for handle in handles:
        handle.remove()
    norms = np.linalg.norm(counts, axis=-1)
    return [round(float(counts[i, 0] @ counts[i, 1] / norms[i].prod()), 4) for i in range(len(gates))]


def load(checkpoint: Path) -> Any:
    """The checkpoint in float32, as transformers runs it.

    transformers tells whether stored experts have their input rows first by comparing shapes, and so leaves a
    square stack as it is stored. The public layout, which the checkpoint has, always wants the transposition.
    """
    from transformers import Qwen3VLMoeForConditionalGeneration

    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        square = (
            name.endswith(("experts.gate_up_proj", "experts.down_proj")) and parameter.shape[1] == parameter.shape[2]
        )
        if square:
            parameter.data = parameter.data.transpose(1, 2).contiguous()
    return model


def evaluate(checkpoint: Path, held_out: Path) -> dict[str, Any]:
    """Every criterion, measured on the written checkpoint."""
    model = load(checkpoint)
    loader = Loader(checkpoint)
    texts, asked = load_sets(loader, held_out)
    text_base, asked_base = predictions(model, texts), predictions(model, asked)
    with experts_at_q2_k(model):
        text_low, asked_low = predictions(model, texts), predictions(model, asked)
    image_token = loader.config["image_token_id"]
    cosines = routing_cosine(model, texts, asked, image_token)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    text_weights = sum(n for name, n in sizes.items() if not name.startswith("model.visual."))
    ratios = []
    for sample in asked:
        vision = int((sample.inputs["input_ids"] == image_token).sum())
        # One more text token: the newline that ends the answer's turn.
        ratios.append(vision / (sample.inputs["input_ids"].numel() + 1 - vision))
    return {
        "text_kl_q2_k": divergence(text_base, text_low),
        "image_kl_q2_k": divergence(asked_base, asked_low),
        "image_kl_q2_k_without_end_token": divergence(asked_base, asked_low, drop_last=1),
        "text_loss": {"bf16": cross_entropy(text_base), "q2_k": cross_entropy(text_low)},
        "image_answer_loss": {"bf16": cross_entropy(asked_base), "q2_k": cross_entropy(asked_low)},
        "image_accuracy": {"bf16": exact(asked_base, asked), "q2_k": exact(asked_low, asked)},
        "image_answers_changed": changes(right_answers(asked_base), right_answers(asked_low)),
        "routing_cosine_per_layer": cosines,
        "routing_cosine_mean": float(np.mean(cosines)),
        "vision_to_text_tokens_min": min(ratios),
        "vision_to_text_tokens_mean": float(np.mean(ratios)),
        "background_share_of_vision_tokens": float(np.mean([sample.background for sample in asked])),
        "expert_share_of_text_weights": sum(n for name, n in sizes.items() if ".experts." in name) / text_weights,
        "parameters": sum(sizes.values()),
        "held_out": {
            "texts": len(texts),
            "text_tokens": sum(len(t[1]) for t in text_base),
            "questions": len(asked),
        },
    }


def verdicts(result: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """The criteria: what, the measured value, whether it holds."""
    high, low = result["image_accuracy"]["bf16"]["all"], result["image_accuracy"]["q2_k"]["all"]
    changed = result["image_answers_changed"]
    ratio, background = result["vision_to_text_tokens_min"], result["background_share_of_vision_tokens"]
    return [
        ("text KL at Q2_K >= 0.05", f"{result['text_kl_q2_k']:.4f}", result["text_kl_q2_k"] >= 0.05),
        (
            "image-answer KL at Q2_K >= 0.02",
            f"{result['image_kl_q2_k']:.4f}",
            result["image_kl_q2_k"] >= 0.02,
        ),
        ("BF16 image accuracy >= 80 %", f"{high:.1%}", high >= 0.8),
        (
            "accuracy falls at Q2_K experts (sign test, p < 0.05)",
            f"{high:.1%} -> {low:.1%}, p = {changed['p']:.3f}",
            high > low and changed["p"] < 0.05,
        ),
        (
            "mean routing cosine < 0.7",
            f"{result['routing_cosine_mean']:.3f}",
            result["routing_cosine_mean"] < 0.7,
        ),
        ("vision : text tokens >= 5 (smallest)", f"{ratio:.2f}", ratio >= 5),
        ("background share > 50 %", f"{background:.1%}", background > 0.5),
        (
            "expert share of text weights >= 85 %",
            f"{result['expert_share_of_text_weights']:.1%}",
            result["expert_share_of_text_weights"] >= 0.85,
        ),
    ]
