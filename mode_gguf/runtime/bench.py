"""What a type per expert costs in speed on this machine, measured by llama-bench on a model of drawn weights.

Two ways of computing are built in (docs/PER_EXPERT_LAYOUT.md): "skip", where a product passes over experts of other
groups, which only the CPU does, and "mask", which works anywhere and computes such rows for nothing.
"""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from mode_gguf.errors import MissingResourceError
from mode_gguf.progress import Progress, silent
from mode_gguf.runtime.installed import Runtime

HIDDEN, WIDTH, EXPERTS, USED, VOCAB, LAYERS = 1024, 512, 32, 4, 512, 2
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
GROUPS: Final = ("Q2_K", "Q3_K", "Q4_K")
ROUNDS: Final = 3
_ARCHITECTURE: Final = "qwen3moe"
_MIDDLE: Final = GROUPS[1]
_SCALES: Final = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2)}
"""Where a block has its float16 scales; any other byte may have any value."""
_SECONDS: Final = 600


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, medians over rounds."""

    prompt: float
    generation: float


def bench(runtime: Runtime, progress: Progress = silent) -> dict[str, Speed]:
    """Speed of experts in one type, and of three types side by side in every way that `runtime` has.

    Raises:
        MissingResourceError: llama-bench is missing or fails.
    """
    ways = ("mask",) if runtime.record.backend == "cuda" else ("skip", "mask")
    measured: dict[str, list[Speed]] = {"one type": [], **{way: [] for way in ways}}
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress.step("speed of a type per expert", ROUNDS * len(measured)) as advance,
    ):
        ordinary, grouped = Path(scratch) / "ordinary.gguf", Path(scratch) / "grouped.gguf"
        write_drawn_model(ordinary, (_MIDDLE,))
        write_drawn_model(grouped, GROUPS)
        for _ in range(ROUNDS):  # round by round, so that other work on the machine meets all alike
            for way, speeds in measured.items():
                speeds.append(_measure(runtime, ordinary) if way == "one type" else _measure(runtime, grouped, way))
                advance(1)
    return {
        way: Speed(
            statistics.median(speed.prompt for speed in speeds), statistics.median(speed.generation for speed in speeds)
        )
        for way, speeds in measured.items()
    }


def _measure(runtime: Runtime, model: Path, way: str | None = None) -> Speed:
    command = [str(runtime.bin / "llama-bench"), "-m", str(model), "-p", "256", "-n", "32", "-r", "1", "-o", "json"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **({"LLAMA_EXPERT_GROUPS": way} if way else {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        said = done.stderr.decode("utf-8", "replace").split("\n")
        failure = f"exit code {done.returncode}: {' / '.join(said[-4:-1])}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        raise MissingResourceError(
            f"{command[0]} cannot measure: {failure}; build it again with: mode-gguf runtime build --rebuild"
        )
    speeds = {"prompt" if row["n_prompt"] else "generation": row["avg_ts"] for row in json.loads(done.stdout)}
    return Speed(**speeds)


def write_drawn_model(path: Path, types: Sequence[str], seed: int = 0) -> None:
    """Write a text model whose experts are drawn to be in `types`, as many in each; one type is an ordinary file."""
    rng = np.random.default_rng(seed)
    grouped = len(types) > 1
    writer = GGUFWriter(path, _ARCHITECTURE + "+expert_groups" * grouped)
    for key, value in {
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": WIDTH,
        "expert_feed_forward_length": WIDTH,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "vocab_size": VOCAB,
    }.items():
        writer.add_uint32(f"{_ARCHITECTURE}.{key}", value)
    writer.add_float32(f"{_ARCHITECTURE}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "none")
    if grouped:
        writer.add_uint32("expert_groups.version", 1)

    def dense(name: str, *shape: int) -> None:
        values = rng.normal(0, shape[-1] ** -0.5, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    dense("token_embd", VOCAB, HIDDEN)
    dense("output", VOCAB, HIDDEN)
    dense("output_norm", HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        dense(f"{block}.attn_q", HEADS * HEAD_DIM, HIDDEN)
        dense(f"{block}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
        dense(f"{block}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
        dense(f"{block}.attn_output", HIDDEN, HEADS * HEAD_DIM)
        for name, width in (("attn", HIDDEN), ("ffn", HIDDEN), ("attn_q", HEAD_DIM), ("attn_k", HEAD_DIM)):
            dense(f"{block}.{name}_norm", width)
        dense(f"{block}.ffn_gate_inp", EXPERTS, HIDDEN)
        groups = [np.sort(members) for members in np.array_split(rng.permutation(EXPERTS), len(types))]
        for projection, rows, columns in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
            for group, (name, members) in enumerate(zip(types, groups, strict=True)):
                stem = f"{block}.ffn_{projection}_exps" + (f".{group}" if group else "")
                data = _drawn(rng, name, (len(members), rows, columns))
                writer.add_tensor(f"{stem}.weight", data, raw_dtype=GGMLQuantizationType[name])
        if grouped:
            numbers = np.full((len(groups), EXPERTS), -1, np.int32)
            for group, members in enumerate(groups):
                numbers[group, members] = np.arange(len(members))
            writer.add_tensor(f"{block}.ffn_exps_map.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _drawn(rng: np.random.Generator, type_name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (experts, rows, row_bytes): blocks with any bytes, and small scales, so that all stays finite."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), np.uint8)
    for offset in _SCALES[type_name]:
        blocks[..., offset : offset + 2] = np.frombuffer(np.float16(1e-5).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)
