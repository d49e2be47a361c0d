"""A checkpoint of Qwen3-VL-30B-A3B's widths with few layers: drawn weights in real formats, for benchmarks of scale.

It is the tests' smallest checkpoint, widened: 128 experts of 2048 x 768 with top-8, a vocabulary of 151,936 with as
many merges as Qwen's, one file of 1.2 GB per layer. Written a few megabytes at a time.
"""

import json
import math
from collections.abc import Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mode_gguf.checkpoint.folder import INDEX_FILE
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

TEXT: Final = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
}
ROPE_SECTIONS: Final = (24, 20, 20)
FIRST_SPECIAL: Final = 400
"""Of the tests' checkpoint; here they follow after `TOKENS`."""
TOKENS: Final = 151_643
_DRAWN_WEIGHTS: Final = 1 << 24
_LAYERS: Final = "model.language_model.layers."


def write_wide_checkpoint(folder: Path, layers: int) -> Path:
    """Write it into `folder` and return that; a folder that has its index already is left as it is."""
    index_path = folder / INDEX_FILE
    if index_path.exists():
        return folder
    write_pico_qwen3vlmoe(folder, shards=1)
    (folder / "model.safetensors").unlink()
    _widen_tokenizer(folder)
    _widen_config(folder / "config.json", layers)
    shapes = _shapes(folder)
    drawn = _drawn()
    files: dict[str, str] = {}
    for part in [*range(layers), None]:
        prefix = f"{_LAYERS}{part}."
        names = [n for n in shapes if (n.startswith(prefix) if part is not None else not n.startswith(_LAYERS))]
        file = f"model-{'other' if part is None else part}.safetensors"
        _write_safetensors(folder / file, {name: shapes[name] for name in names}, drawn)
        files |= dict.fromkeys(names, file)
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _widen_config(path: Path, layers: int) -> None:
    config: dict[str, Any] = json.loads(path.read_text())
    config["text_config"] |= {**TEXT, "num_hidden_layers": layers}
    config["text_config"]["rope_scaling"]["mrope_section"] = list(ROPE_SECTIONS)
    config["vision_config"]["out_hidden_size"] = TEXT["hidden_size"]
    # A merger belongs to an earlier layer than the last one, and there may be two layers only.
    config["vision_config"]["deepstack_visual_indexes"] = [0]
    for values in (config, config["text_config"]):
        values |= {key: _moved(value) for key, value in values.items() if key.endswith("_token_id")}
    path.write_text(json.dumps(config, indent=2))


def _moved(token: int) -> int:
    """The special tokens follow all others."""
    return token - FIRST_SPECIAL + TOKENS


def _widen_tokenizer(folder: Path) -> None:
    """As many tokens and merges as Qwen has, of two and three bytes."""
    path = folder / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    letters = [token for token in vocabulary if len(token) == 1]
    pairs = [a + b for a, b in product(letters, letters)]
    candidates = ((left, right) for lefts in (letters, pairs) for left, right in product(lefts, letters))
    new = ((left, right) for left, right in candidates if left + right not in vocabulary)
    for number, (left, right) in enumerate(islice(new, TOKENS - FIRST_SPECIAL), FIRST_SPECIAL):
        vocabulary[left + right] = number
        merges.append([left, right])
    for token in tokenizer["added_tokens"]:
        token["id"] = _moved(token["id"])
    path.write_text(json.dumps(tokenizer))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges) + "\n")
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("generation_config.json", "eos_token_id")):
        settings: dict[str, Any] = json.loads((folder / name).read_text())
        old = settings[key]
        settings[key] = (
            {str(_moved(int(token))): value for token, value in old.items()}
            if isinstance(old, dict)
            else [_moved(token) for token in old]
        )
        (folder / name).write_text(json.dumps(settings, indent=2))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors, experts as the hubs store them: (E, n_in, rows)."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: (s[0], s[2], s[1]) if ".experts." in name else s for name, s in shapes.items()}


def _drawn() -> np.ndarray:
    """Bits of bfloat16 weights, 2^24 of them."""
    weights = np.random.default_rng(0).standard_normal(_DRAWN_WEIGHTS, np.float32) * np.float32(0.02)
    return (weights.view(np.uint32) >> 16).astype(np.uint16)


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], drawn: np.ndarray) -> None:
    """Every tensor starts at another place of the drawn weights; norms are ones."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, (name, shape) in enumerate(shapes.items()):
            if len(shape) == 1 and name.endswith("weight"):
                file.write(np.full(shape, 0x3F80, np.uint16).data)
            else:
                _write_drawn(file, math.prod(shape), np.roll(drawn, 7919 * number))


def _write_drawn(file: BinaryIO, count: int, drawn: np.ndarray) -> None:
    for start in range(0, count, len(drawn)):
        file.write(drawn[: count - start].data)
