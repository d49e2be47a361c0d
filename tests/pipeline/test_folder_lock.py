"""A folder is worked in by one process, is tidied up first, and keeps a log."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mode_gguf.errors import InputError, UsageError
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.workfolder import WorkFolder

HOLDER = """
import sys, time
from pathlib import Path
from mode_gguf.artifacts import replaced_atomically
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.workfolder import WorkFolder

folder = WorkFolder(Path(sys.argv[1]), "pico")
with folder_lock(folder), replaced_atomically(folder.plan):
    print("there", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that works in the folder, and is writing plan.json."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n"
            yield process
        finally:
            process.kill()


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "work", "pico")
    with holder(folder.path) as other:
        (part,) = folder.path.glob("*.part")
        with pytest.raises(InputError) as error, folder_lock(folder):
            pass
        assert f"another mode-gguf works in this folder (process {other.pid}, since 20" in str(error.value)
        assert "--out" in str(error.value)
        assert part.exists(), "the other one needs it"
        other.send_signal(signal.SIGKILL)
        other.wait()
    foreign = folder.path / ".download.part"
    foreign.write_text("not ours")
    with folder_lock(folder):  # a killed process holds no lock
        assert not part.exists()
        assert json.loads(folder.lock.read_text())["pid"] == os.getpid()
    assert foreign.exists()


def test_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = WorkFolder(tmp_path / "work", "pico")
    with folder_lock(folder):
        logging.getLogger("mode_gguf.calibration").warning("too few tokens")
        folder.plan.write_text("{}")
    with pytest.raises(UsageError), folder_lock(folder):
        raise UsageError("no such type")
    with pytest.raises(ZeroDivisionError), folder_lock(folder):
        1 / 0  # noqa: B018
    logging.getLogger("mode_gguf").warning("after it")
    text = folder.log.read_text()
    assert text.count("INFO    mode-gguf ") == 3
    assert sys.argv[0] in text
    assert "WARNING too few tokens" in text
    assert "INFO    finished in 0." in text
    assert "ERROR   no such type\n" in text
    assert "ERROR   ZeroDivisionError: division by zero\nTraceback" in text
    assert "after it" not in text
    assert capsys.readouterr().err == ""


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "deep" / "work", "pico")
    with pytest.raises(UsageError), folder_lock(folder):
        raise UsageError("no such type")
    assert not folder.path.exists()
    folder.path.mkdir()
    with pytest.raises(UsageError), folder_lock(folder):
        raise UsageError("no such type")
    assert folder.log.exists()


SPILLING = """
import sys, time
import torch
from pathlib import Path
from mode_gguf.forward.hidden_store import HiddenStore
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.workfolder import WorkFolder

with folder_lock(WorkFolder(Path(sys.argv[1]), "pico")), HiddenStore(limit_bytes=0) as store:
    store.put("a", torch.ones(1000))
    print("there", flush=True)
    time.sleep(60)
"""


def test_hidden_states_of_killed_runs_go_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whether the run goes on with the same TMPDIR or another; those of a run that is alive stay."""
    places = {name: tmp_path / name for name in ("killed", "alive", "now")}
    running = {}
    for name, place in places.items():
        place.mkdir()
        if name != "now":
            command = [sys.executable, "-c", SPILLING, str(tmp_path / f"work-{name}")]
            environment = {**os.environ, "TMPDIR": str(place)}
            running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        for process in running.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n"
        (left,), (used,) = (list(places[name].iterdir()) for name in running)
        assert left.stat().st_size
        running["killed"].kill()
        running["killed"].wait()
        monkeypatch.setattr("tempfile.tempdir", str(places["alive"]))
        with folder_lock(WorkFolder(tmp_path / "another", "pico")):
            assert used.exists(), "another process uses it"
            assert left.exists(), "nothing here says that it is there"
        monkeypatch.setattr("tempfile.tempdir", str(places["now"]))
        with folder_lock(WorkFolder(tmp_path / "work-killed", "pico")):
            assert not left.exists()
        assert used.exists()
        shutil.copytree(used, again := places["now"] / "mode-gguf-hidden-again")
        with folder_lock(WorkFolder(tmp_path / "another", "pico")):
            assert not again.exists()
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
