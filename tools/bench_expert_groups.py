"""Speed of one type per expert at equal bytes: experts in three types, against all experts in the middle type.

    python tools/bench_expert_groups.py STOCK PATCHED [--layers N] [--rounds N] [--json FILE]

STOCK and PATCHED are folders with `llama-bench` of the two builds of llama.cpp. The files have a large model's widths,
few layers, a vocabulary of 1024, and drawn weights; the experts of a type are copies of one another, because speed
depends on bytes, not on values, and each copy has bytes of its own. The types alternate at random among the experts,
in shares that take as many bytes as the middle type. All files are measured in turn, round after round, so that other
work on the machine meets them alike; shown are medians, and medians of the ratio to the middle type in the same round.

"fair" is what the three types' own speeds in stock would give at these shares, if grouping cost nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from rich.console import Console
from rich.table import Table

from mode_gguf.quantization.packer import pack_matrix
from mode_gguf.quantization.types import QUANT_TYPES

TYPES: Final = ("Q2_K", "Q3_K", "Q4_K")
HIDDEN, WIDTH, EXPERTS, USED, VOCAB = 2048, 768, 128, 8, 1024
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
ARCHITECTURE: Final = "qwen3moe"


@dataclass(frozen=True, slots=True)
class Case:
    """A file in a build; `path` is how the patched build computes groups."""

    name: str
    file: Path
    build: Path
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens per second, medians over rounds, and medians of their ratios to the reference case."""

    name: str
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float


def equal_bytes() -> dict[str, int]:
    """Experts per type that take the middle type's bytes, the middle type having as many as the rarer other."""
    low, middle, high = (QUANT_TYPES[name].row_bytes(HIDDEN) for name in TYPES)
    best = min(
        ((n, m) for n in range(1, EXPERTS) for m in range(1, EXPERTS - n)),
        key=lambda pair: (
            abs(pair[0] * (middle - low) - pair[1] * (high - middle)),
            abs(EXPERTS - pair[0] - 2 * pair[1]),
        ),
    )
    return dict(zip(TYPES, (best[0], EXPERTS - sum(best), best[1]), strict=True))


class Weights:
    """Drawn matrices, packed once per shape and type."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._packed: dict[tuple[int, int, str], np.ndarray] = {}

    def packed(self, rows: int, columns: int, type_name: str) -> np.ndarray:
        """uint8 (rows, row_bytes)."""
        key = (rows, columns, type_name)
        if key not in self._packed:
            values = self._rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
            self._packed[key] = pack_matrix(values, QUANT_TYPES[type_name], None, name="drawn")
        return self._packed[key]

    def router(self) -> np.ndarray:
        """float32 (EXPERTS, HIDDEN), large enough that tokens differ in their experts."""
        return self._rng.normal(0, 1, (EXPERTS, HIDDEN)).astype(np.float32)


def write_model(path: Path, layers: int, types: Sequence[str], weights: Weights, groups: Sequence[np.ndarray]) -> Path:
    """Write a model whose experts of group g, `groups[g]`, are in types[g]; one group is an ordinary file."""
    grouped = len(groups) > 1
    writer = GGUFWriter(path, ARCHITECTURE + "+expert_groups" * grouped)
    for key, value in {
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "block_count": layers,
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
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    writer.add_float32(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{ARCHITECTURE}.rope.freq_base", 1e6)
    writer.add_string("tokenizer.ggml.model", "none")
    if grouped:
        writer.add_uint32("expert_groups.version", 1)

    def add(name: str, rows: int, columns: int, type_name: str = "Q6_K", copies: int = 0) -> None:
        packed = weights.packed(rows, columns, type_name)
        data = np.broadcast_to(packed, (copies, *packed.shape)) if copies else packed
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType[type_name])

    def norm(name: str, width: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    add("token_embd", VOCAB, HIDDEN)
    add("output", VOCAB, HIDDEN)
    norm("output_norm", HIDDEN)
    for layer in range(layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_q", HEADS * HEAD_DIM, HIDDEN)
        add(f"{block}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"{block}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"{block}.attn_output", HIDDEN, HEADS * HEAD_DIM)
        for name, width in (("attn", HIDDEN), ("ffn", HIDDEN), ("attn_q", HEAD_DIM), ("attn_k", HEAD_DIM)):
            norm(f"{block}.{name}_norm", width)
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", weights.router())
        for projection, rows, columns in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
            for group, members in enumerate(groups):
                stem = f"{block}.ffn_{projection}_exps" + (f".{group}" if group else "")
                add(stem, rows, columns, types[group], copies=len(members))
        if grouped:
            numbers = np.full((len(groups), EXPERTS), -1, np.int32)
            for group, members in enumerate(groups):
                numbers[group, members] = np.arange(len(members))
            writer.add_tensor(f"{block}.ffn_exps_map.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one prompt and of single tokens after it."""
    command = [case.build / "llama-bench", "-m", case.file, "-p", arguments.prompt, "-n", arguments.generate]
    command += ["-r", 1, "-t", arguments.threads, "--repack", int(not arguments.no_repack), "-o", "json"]
    environment = {**os.environ, **({"LLAMA_EXPERT_GROUPS": case.path} if case.path else {})}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-bench fails at {case.name}: {done.stderr[-2000:]}")
    return {"prefill" if entry["n_prompt"] else "decode": entry["avg_ts"] for entry in json.loads(done.stdout)}


def summarized(rounds: Sequence[Mapping[str, Mapping[str, float]]], reference: str) -> list[Result]:
    """Medians over rounds; a round has tokens per second by case and kind."""
    results = []
    for name in rounds[0]:
        speed = {kind: statistics.median(one[name][kind] for one in rounds) for kind in ("prefill", "decode")}
        ratio = {
            kind: statistics.median(one[name][kind] / one[reference][kind] for one in rounds)
            for kind in ("prefill", "decode")
        }
        results.append(Result(name, **speed, prefill_ratio=ratio["prefill"], decode_ratio=ratio["decode"]))
    return results


def with_fair(one: dict[str, dict[str, float]], shares: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """A round, and what the shares' mean time per token would give: experts are chosen equally often here."""
    fair = {
        kind: EXPERTS / sum(count / one[f"{name}, stock"][kind] for name, count in shares.items())
        for kind in ("prefill", "decode")
    }
    return {**one, "fair": fair}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stock", type=Path, help="folder with llama-bench of the stock build")
    parser.add_argument("patched", type=Path, help="folder with llama-bench of the patched build")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-repack", action="store_true", help="weights are not rearranged at load, in both builds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    weights = Weights(arguments.seed)
    shares = equal_bytes()
    order = np.random.default_rng(arguments.seed).permutation(EXPERTS)
    groups = [np.sort(part) for part in np.split(order, np.cumsum(list(shares.values()))[:-1])]
    middle = TYPES[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        uniform = {
            name: write_model(folder / f"{name}.gguf", arguments.layers, [name], weights, [np.arange(EXPERTS)])
            for name in TYPES
        }
        split = write_model(folder / "split.gguf", arguments.layers, [middle] * 3, weights, groups)
        mixed = write_model(folder / "mixed.gguf", arguments.layers, TYPES, weights, groups)
        cases = [Case(f"{name}, stock", file, arguments.stock) for name, file in uniform.items()]
        cases.append(Case(f"{middle}, patched", uniform[middle], arguments.patched))
        cases += [Case(f"{middle} in groups, {path}", split, arguments.patched, path) for path in ("skip", "mask")]
        cases += [Case(f"mixed, {path}", mixed, arguments.patched, path) for path in ("skip", "mask")]
        sizes = {file.stem: file.stat().st_size for file in (*uniform.values(), mixed)}
        rounds = [
            with_fair({case.name: measure(case, arguments) for case in cases}, shares) for _ in range(arguments.rounds)
        ]

    results = summarized(rounds, f"{middle}, stock")
    counts = ", ".join(f"{count} {name}" for name, count in shares.items())
    title = f"{arguments.layers} layers, experts {counts}; {arguments.threads} threads, {arguments.rounds} rounds"
    title += ", no repacking" * arguments.no_repack
    table = Table("file, build or path", "prefill tok/s", "decode tok/s", "prefill ratio", "decode ratio", title=title)
    for result in results:
        numbers = result.prefill, result.decode, result.prefill_ratio, result.decode_ratio
        table.add_row(result.name, *(f"{number:.3g}" for number in numbers))
    Console().print(table)
    Console().print(f"bytes: mixed {sizes['mixed']}, {middle} {sizes[middle]}")
    if arguments.json:
        report = {"shares": shares, "bytes": sizes, "rounds": rounds, "results": [asdict(one) for one in results]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
