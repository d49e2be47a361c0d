"""Commands in two processes, as `torchrun --nproc-per-node 2 -m mode_gguf_cli ...` starts them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mode_gguf.allocation.plan import Plan
from tests.e2e.conftest import Run, samples, settings
from tests.together import SECONDS, ended, start_together

SMALL = (*samples(4, 3), *settings("calibration.seed=1"))
NEAREST = ("--rounding", "nearest", "--no-validate", "--json")


def test_convert_gives_the_same_plan(pico: Path, tmp_path: Path, run: Run) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    command: tuple[str | Path, ...] = ("convert", pico, "--bpw", "4.0", *SMALL, *NEAREST)
    first, second = ended(start_together(["-m", "mode_gguf_cli", *command, "--out", shared], 2))
    assert first[0] == 0, first[2]
    assert second == (0, "", "")
    result = json.loads(first[1])  # and nothing but that
    assert {"calibrate", "sensitivity", "plan", "export", "projector"} == set(result["seconds"])
    assert re.search(r"sensitivity: [\d,]+ units .* s each", first[2].replace("\n", " "))
    run(*command, "--out", alone)
    assert Plan.load(shared / "plan.json").types == Plan.load(alone / "plan.json").types
    assert sorted(path.name for path in shared.iterdir()) == sorted(path.name for path in alone.iterdir())
    counts = load_file(shared / "calibration.safetensors")
    for name, array in load_file(alone / "calibration.safetensors").items():
        np.testing.assert_allclose(counts[name], array, rtol=1e-12, err_msg=name)


def test_a_command_that_shares_nothing_out_ends_all(pico: Path) -> None:
    command: list[str | Path] = ["-m", "mode_gguf_cli", "convert", pico, "--bpw", "4.0", "--dry-run", "--json"]
    first, second = ended(start_together(command, 2))
    assert first[0] == 0, first[2]
    assert json.loads(first[1])
    assert second == (0, "", "")


def test_an_error_in_the_second_process_is_one_message(pico: Path, tmp_path: Path) -> None:
    """b.txt is the second sample; that its text is too short shows when its process reads it."""
    for name, text in (("a", "The quick brown fox jumps."), ("b", "a"), ("c", "There are 3 shapes.")):
        (tmp_path / f"{name}.txt").write_text(text)
    command: list[str | Path] = ["-m", "mode_gguf_cli", "calibrate", pico, "--out", tmp_path / "out"]
    command += ["--calibration", tmp_path]
    first, second = ended(start_together(command, 2))
    assert first[:2] == (4, "")
    assert first[2].count("error:") == 1
    assert "b.txt#0: text is shorter than two tokens" in first[2].replace("\n", " ")
    assert "Traceback" not in first[2]
    assert second == (0, "", "")
    assert not (tmp_path / "out" / "calibration.safetensors").exists()


def test_torchrun_starts_and_ends_them(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps.")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "mode_gguf_cli", "calibrate", pico, "--out", tmp_path / "out", "--calibration", tmp_path]
    done = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0
    assert done.stderr.replace("\n", " ").count("1 samples cannot be shared out over 2 processes") == 1
    assert re.search(r"exitcode\s*: 2 ", done.stderr)
