"""KL divergence, percentiles, agreement and perplexity of text, beside those of stock llama-perplexity."""

import random
from pathlib import Path

import pytest

from compare_with_perplexity import TOLERANCE, find_tool, our_scores, read_windows, run_tool, tool_options
from mode_gguf.llama_cpp.engines import engine_for
from tests.validation.conftest import Files

CONTEXT = 64
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "12", "red", "circles", "blue", "squares", "to", "left")


@pytest.mark.parametrize("exact", [True, False])
def test_same_as_stock(full: Files, small: Files, tmp_path: Path, exact: bool) -> None:
    tool = find_tool()
    if tool is None:
        pytest.skip("llama-perplexity is not there; mode-gguf runtime build --stock makes it")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=400)))
    models = (full.text, small.text)
    base = tmp_path / "base"
    options = tool_options(CONTEXT, 1, exact=exact)
    if not exact:
        options.append("--no-repack")  # what it gains is speed, and not every machine that says so has AMX
    stock = run_tool(tool, models, text, base, options)
    windows = read_windows(base)
    ours = our_scores(models, windows, engine_for(*models), exact=exact, threads=1)
    assert windows.tokens.shape[1] == CONTEXT
    assert ours.positions == len(windows.tokens) * (CONTEXT // 2 - 1) > 100
    assert ours.kl_mean == pytest.approx(stock["kl_mean"], rel=TOLERANCE)
    assert ours.kl_p99 == pytest.approx(stock["kl_p99"], rel=0.05)
    assert ours.kl_p99_9 == pytest.approx(stock["kl_p99_9"], rel=0.05)
    assert ours.perplexity == pytest.approx(stock["perplexity"], rel=TOLERANCE)
    assert ours.reference_perplexity == pytest.approx(stock["reference_perplexity"], rel=TOLERANCE)
    assert ours.top1_agreement == pytest.approx(stock["top1_percent"] / 100, abs=0.02)
