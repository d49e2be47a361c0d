"""A GPU's memory as the budget: the text model gets what is left, and it is said where the rest went."""

import json
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.allocation.plan import Plan
from tests.e2e.conftest import SMALL, Run, settings

FIT = ("--ctx", "2048", "--kv-type", "q8_0", *settings("plan.budget.gpu.reserve=64MiB"))
CONVERT = ("--no-validate", "--rounding", "nearest", *SMALL)


def dry(run: Run, pico: Path, *options: str) -> dict[str, Any]:
    estimate: dict[str, Any] = json.loads(run("convert", pico, "--dry-run", "--json", *options))
    return estimate


def beside(run: Run, pico: Path) -> int:
    """Bytes of everything but the text model."""
    memory = dry(run, pico, "--fit", "1GiB", *FIT)["memory"]
    others = (line for line in memory["lines"] if line["on_gpu"] and line["name"] != "text model")
    return sum(int(line["bytes"]) for line in others)


def test_convert_uses_the_memory(pico: Path, out: Path, run: Run) -> None:
    memory = beside(run, pico) + 3 * 2**20
    arguments = ("convert", pico, "--fit", str(memory), *FIT, "--out", out, *CONVERT, "--json")
    result = json.loads(run(*arguments))
    plan = Plan.load(out / "plan.json")
    assert plan.memory is not None
    assert plan.memory.memory == memory
    text = next(line for line in plan.memory.lines if line.name == "text model")
    (embedding,) = (tensor.size_bytes for tensor in plan.tensors if tensor.name == "token_embd.weight")
    assert text.bytes == plan.size_bytes - embedding
    assert 0.99 * memory < plan.memory.used <= memory
    assert sum(tensor["size_bytes"] for tensor in json.loads((out / "plan.json").read_text())["tensors"]) < (
        Path(result["model"]).stat().st_size
    )
    assert set(json.loads(run(*arguments))["seconds"].values()) == {0.0}


def test_another_way_of_running_it_is_another_plan(pico: Path, out: Path, run: Run) -> None:
    memory = str(beside(run, pico) + 3 * 2**20)
    arguments = ("convert", pico, "--out", out, *CONVERT, "--json", "--fit", memory)
    run(*arguments, *FIT)
    larger_images = (*FIT, *settings("plan.budget.gpu.image_tokens=900"))
    seconds = json.loads(run(*arguments, *larger_images))["seconds"]
    assert seconds["plan"] > 0
    assert seconds["calibrate"] == seconds["sensitivity"] == 0
    one_more = str(int(memory) + 1)
    assert json.loads(run(*arguments[:-1], one_more, *larger_images))["seconds"]["plan"] > 0


def test_plan_shows_the_memory_breakdown(pico: Path, out: Path, run: Run) -> None:
    memory = str(beside(run, pico) + 3 * 2**20)
    shown = run("plan", pico, "--out", out, "--fit", memory, *FIT)
    for name in ("KV cache: 2048 cells x 3 layers, q8_0", "text compute buffer", "image encoder", "reserve", "free"):
        assert name in shown
    document = json.loads(run("plan", pico, "--out", out, "--fit", memory, *FIT, "--json"))
    assert document["memory"]["used"] + document["memory"]["free"] == int(memory)
    assert document["memory"]["settings"]["context"] == 2048


def test_more_than_enough_takes_the_largest_types(pico: Path, run: Run) -> None:
    estimate = dry(run, pico, "--fit", "1GiB", *FIT)
    assert estimate["bpw"] == estimate["reachable_bpw"][1]
    assert estimate["memory"]["free"] > 2**29


def test_what_does_not_fit_says_what_does(pico: Path, run: Run) -> None:
    least = beside(run, pico) + 2**20
    error = run("convert", pico, "--dry-run", "--fit", str(least), *FIT, code=3)
    needed, context = error.split("needs --fit ")[1].split("MiB")[0], error.rpartition("--ctx ")[2].strip()
    assert dry(run, pico, "--fit", f"{needed}MiB", *FIT)["bpw"] > 0
    assert dry(run, pico, "--fit", str(least), *FIT[2:], "--ctx", context)["bpw"] > 0
    run("convert", pico, "--dry-run", "--fit", str(least), *FIT[2:], "--ctx", str(int(context) + 256), code=3)
    assert "the largest is" not in run("convert", pico, "--dry-run", "--fit", "60MiB", *FIT, code=3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--fit", "24GiB"), "give --ctx"),
        (("--ctx", "4096"), "--ctx goes with --fit"),
        (("--kv-type", "q8_0"), "--kv-type goes with --fit"),
        (("--fit", "24GiB", "--ctx", "4096", "--bpw", "3"), "--bpw and --fit are different budgets"),
        (("--fit", "24potatoes", "--ctx", "4096"), "--fit: a number with GB"),
        (
            ("--fit", "24GiB", "--ctx", "4096", *settings("plan.budget.gpu.reserve=much")),
            "plan.budget.gpu.reserve: a number with GB",
        ),
    ],
)
def test_options_that_mean_nothing(pico: Path, run: Run, options: tuple[str, ...], error: str) -> None:
    assert error in run("convert", pico, "--dry-run", *options, code=2)
