"""Compare our KL divergence of text with that of stock `llama-perplexity --kl-divergence`, on the same tokens.

    python experiments/compare_with_perplexity.py REFERENCE CANDIDATE TEXT [--llama-cpp FOLDER] [--library FOLDER]

The tool cuts TEXT into windows of as many tokens as its context holds, and scores the second half of each. Its own file
of reference log-probabilities names the tokens; the very same windows then go through what `mode-gguf validate` scores
texts with: llama.cpp in this process, distributions as they are stored, compare. Both compute with an F32 cache and
without repacked weights or flash attention, unless --defaults is given. Exit code 1 if the mean KL differs by more than
--tolerance.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from experiment_command import command_parser
from external_program import run_program
from mode_gguf.llama_cpp.engines import Engine, engine_for, named_engine
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.llama_cpp.installed_tools import find_llama_cpp
from mode_gguf.llama_cpp.runtime.installed import find_runtime
from mode_gguf.validation.distributions import normalised, pack_distributions, unpack_distributions
from mode_gguf.validation.divergence import Scores, compare
from mode_gguf.validation.report import Divergence

TOOL: Final = "llama-perplexity"
TOLERANCE: Final = 0.01
_MAGIC: Final = b"_logits_"
_NUMBER: Final = r"\s*:\s*(\d+\.\d+)"
_PRINTED: Final = {
    "perplexity": "Mean PPL\\(Q\\)",
    "reference_perplexity": "Mean PPL\\(base\\)",
    "kl_mean": "Mean    KLD",
    "kl_p99": "99\\.0%   KLD",
    "kl_p99_9": "99\\.9%   KLD",
    "top1_percent": "Same top p",
}


@dataclass(frozen=True, slots=True)
class Windows:
    """What a file of `--kl-divergence-base` scored; `tokens` is int32 (windows, context)."""

    tokens: np.ndarray

    @property
    def first(self) -> int:
        """The first position whose prediction is scored; the last one that is predicts the last token."""
        return int(self.tokens.shape[1]) // 2


def find_tool(llama_cpp: Path | None = None) -> Path | None:
    """The user's program, else one that `mode-gguf runtime build` made."""
    found = find_llama_cpp(llama_cpp)[TOOL]
    if found or llama_cpp:
        return found
    runtimes = filter(None, (find_runtime(stock=True), find_runtime()))
    return next((path for runtime in runtimes if (path := find_llama_cpp(runtime.bin)[TOOL])), None)


def run_tool(tool: Path, models: tuple[Path, Path], text: Path, base: Path, options: list[str]) -> dict[str, float]:
    """Score models[1] against models[0]; `base` is written. What the program printed, by the names of `Divergence`."""
    reference, candidate = models
    common = ["-f", text, "--kl-divergence-base", base, *options]
    run_program(tool, "-m", reference, *common)
    done = run_program(tool, "-m", candidate, *common, "--kl-divergence")
    printed = done.stdout + done.stderr
    found = {}
    for name, label in _PRINTED.items():
        match = re.search(label + _NUMBER, printed)
        if match is None:
            sys.exit(f"{tool} printed no {label}; it does so from 100 scored tokens on:\n{printed[-2000:]}")
        found[name] = float(match[1])
    return found


def read_windows(base: Path) -> Windows:
    """The tokens at the head of the file: magic, then uint32 context, int32 vocabulary and number of windows."""
    with base.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            sys.exit(f"{base}: is no file of log-probabilities")
        context, _, count = np.fromfile(file, np.int32, 3)
        return Windows(np.fromfile(file, np.int32, context * count).reshape(count, context))


def our_scores(models: tuple[Path, Path], windows: Windows, engine: Engine, *, exact: bool, threads: int) -> Divergence:
    """The same windows by our own means."""
    reference, candidate = models

    def distributions(path: Path) -> Iterator[np.ndarray]:
        context = windows.tokens.shape[1]
        with LlamaModel(path, context=context, threads=threads, exact=exact, engine=engine) as model:
            for window in windows.tokens.tolist():
                tokens = [*model.beginning, *window[len(model.beginning) :]]
                yield model.continuation_logits(tokens)[windows.first :]

    kept = [pack_distributions(normalised(logits)) for logits in distributions(reference)]
    parts = []
    for arrays, logits, window in zip(kept, distributions(candidate), windows.tokens.tolist(), strict=True):
        parts.append(compare(unpack_distributions(arrays), logits, window[windows.first + 1 :]))
    return Divergence.of(Scores.joined(parts), with_reference=True)


def main() -> None:
    """Compare and print."""
    parser = command_parser(__doc__)
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("text", type=Path, help="plain text")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-perplexity")
    parser.add_argument("--library", type=Path, help="a llama.cpp with shared libraries for our side")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=-1, help="windows at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--defaults", action="store_true", help="cache, attention and repacking as llama.cpp has them")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    arguments = parser.parse_args()
    tool = find_tool(arguments.llama_cpp)
    if tool is None:
        sys.exit(f"{TOOL} was not found; make it with: mode-gguf runtime build --stock")
    models = (arguments.reference, arguments.candidate)
    engine = named_engine(arguments.library) if arguments.library else engine_for(*models)
    options = tool_options(arguments.context, arguments.threads, exact=not arguments.defaults)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        stock = run_tool(tool, models, arguments.text, base, [*options, "--chunks", str(arguments.windows)])
        windows = read_windows(base)
    ours = our_scores(models, windows, engine, exact=not arguments.defaults, threads=arguments.threads)
    table = Table("", str(tool.name), f"ours, {engine.version}", "ratio")
    for name, value in stock.items():
        mine = 100 * (ours.top1_agreement or 0) if name == "top1_percent" else getattr(ours, name)
        table.add_row(name, f"{value:.6f}", f"{mine:.6f}", f"{mine / value:.5f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"{ours.positions} positions in {len(windows.tokens)} windows of {windows.tokens.shape[1]} tokens")
    assert ours.kl_mean is not None
    if abs(ours.kl_mean / stock["kl_mean"] - 1) > arguments.tolerance:
        sys.exit(f"mean KL {ours.kl_mean:.6f}, {stock['kl_mean']:.6f} expected within {100 * arguments.tolerance:g} %")


def tool_options(context: int, threads: int, *, exact: bool) -> list[str]:
    """One window at a time, as ours; what `exact` of `LlamaModel` is in the program's own words."""
    options = ["-c", str(context), "-b", str(context), "-ub", str(context), "-t", str(threads)]
    if exact:
        options += ["--no-repack", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    return options


if __name__ == "__main__":
    main()
