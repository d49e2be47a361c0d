"""A conversion that is killed at any moment leaves nothing wrong, and repeating it gives what it would have given."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mode_gguf import artifacts, pipeline
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.progress import Advance
from mode_gguf.recipe import OptionLayer, Recipe

KILLS = 24
IGNORED = {"mode-gguf.log", ".mode-gguf.lock", ".mode-gguf.digests", "report.html"}  # the page shows times
OF_TIMES = ("seconds", "finished", "text_identity", "image_identity")
"""Keys of JSON files; identities of reference.json hold the times of the files it was made from."""

# Children are forked from a process that has imported everything and computed nothing.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "mode_gguf.pipeline",
        "mode_gguf.importance.unit_kl",
        "mode_gguf.importance.sensitivity",
        "mode_gguf.feedback.round_layers",
        "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
        "transformers.models.qwen2_vl.image_processing_qwen2_vl",
        "xllamacpp",
    ]
)


def options(data: Path) -> Recipe:
    """Every stage, as little of each as there can be."""
    values = {
        "plan": {"budget": {"bpw": 3.6}, "unit_kl": True},
        "calibration": {"source": str(data / "chats.jsonl")},
        "sensitivity": {"measured_samples": 1, "types": "Q2_K,Q4_K", "dense_types": "Q4_K"},
        "compute": {"threads": 1},
        "validation": {"samples": str(data / "held-out")},
    }
    return Recipe.of(OptionLayer(values))


class Moments:
    """Moments of a conversion by name, in their order; kills the process at one of them."""

    def __init__(self, fatal: str | None) -> None:
        self.fatal, self.seen = fatal, list[str]()

    def pass_(self, name: str) -> None:
        self.seen.append(name)
        if name == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def step(self, description: str, total: int, *_: Any, **__: Any) -> Iterator[Advance]:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.pass_(f"{description}: {done} of {total}")

        self.pass_(f"{description}: begins")
        yield advance

    def watch_files(self) -> None:
        """A moment before a file is written, when it is written, and when it has its name."""
        make, to_disk, rename = tempfile.mkstemp, artifacts._to_disk, Path.replace

        def mkstemp(*arguments: Any, **named: Any) -> tuple[int, str]:
            self.pass_(f"before {named.get('prefix')}")
            return make(*arguments, **named)

        def written(path: Path) -> None:
            to_disk(path)
            self.pass_(f"written {path.name.rpartition('.mode-gguf')[0].rpartition('.')[0]}")

        def replaced(path: Path, target: Path) -> Path:
            result = rename(path, target)
            self.pass_(f"named {target.name}")
            return result

        tempfile.mkstemp, artifacts._to_disk = mkstemp, written  # type: ignore[assignment]
        Path.replace = replaced  # type: ignore[assignment, method-assign]


def convert(model: Path, out: Path, data: Path, fatal: str | None, record: Path | None) -> None:
    """Convert in a process of its own up to the fatal moment; record all moments."""
    moments = Moments(fatal)
    moments.watch_files()
    pipeline.convert(pipeline.open_model(model, out, progress=moments), options(data))
    if record:
        record.write_text(json.dumps(moments.seen))


def run_convert(model: Path, out: Path, data: Path, fatal: str | None = None, record: Path | None = None) -> int:
    """Exit code of a conversion; minus 9 when it was killed."""
    return exit_code(convert, model, out, data, fatal, record)


def exit_code(work: Callable[..., None], *arguments: object) -> int:
    """Exit code of a process of its own that does `work`."""
    process = processes.Process(target=work, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture and one text to calibrate on, and one text held out."""
    folder = tmp_path_factory.mktemp("data")
    text = "The quick brown fox jumps over the lazy dog."
    Image.fromarray(np.tile(np.arange(96, dtype=np.uint8)[:, None, None], (1, 96, 3))).save(folder / "picture.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    rows = [
        {"image": "picture.png", "conversations": turns},
        {"conversations": [{"from": "human", "value": text}, turns[1]]},
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "held-out").mkdir()
    (folder / "held-out" / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return folder


def contents(out: Path) -> dict[str, Any]:
    """Files under final names, without what must differ between two runs: times, and fingerprints of times."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or path.name in IGNORED or path.name.endswith(".part"):
            continue
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
            if path.name == "stages.json":
                found[name].get("validate", {}).pop("outputs", None)  # the report has times
                found[name].pop("report", None)  # so has the page
        elif path.parent.name == "reference":
            found[name] = {key: array.tobytes() for key, array in load_file(path).items()}
        else:
            found[name] = path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in OF_TIMES}
    if isinstance(value, list):
        return [without_times(one) for one in value]
    return value


def test_killed_at_any_moment(pico: Path, tmp_path: Path, data: Path) -> None:
    whole, record = tmp_path / "whole" / "work", tmp_path / "moments.json"
    assert run_convert(pico, whole, data, record=record) == 0
    expected = contents(whole)
    moments = json.loads(record.read_text())
    assert {"stages.json", "report.json", "plan.json", "unit-kl.safetensors"} <= set(expected)
    assert (whole / "report.html").exists()

    out, spread, kills = tmp_path / "work", random.Random(0), 0
    for number in range(KILLS):
        at = number * len(moments) // KILLS, (number + 1) * len(moments) // KILLS
        fatal = moments[spread.randrange(*at)]
        code = run_convert(pico, out, data, fatal)
        if code == 0:  # that moment is over, such as a stage that had finished
            assert contents(out) == expected, f"finished before {fatal}"
            continue
        assert code == -signal.SIGKILL
        kills += 1
        check_nothing_is_wrong(out, expected, fatal)
    assert kills >= 20
    assert run_convert(pico, out, data) == 0
    assert contents(out) == expected
    assert list(out.rglob("*.part")) == []
    assert not (out / "rounded").exists()
    assert not (out / "unit-kl.partial").exists()


def check_nothing_is_wrong(out: Path, expected: dict[str, Any], moment: str) -> None:
    """Final files are those of the run that nobody killed; stages.json speaks of no others."""
    passing = ("stages.json", "unit-kl.partial", "rounded/")
    for name, content in contents(out).items():
        if not name.startswith(passing):
            assert content == expected[name], f"{name} after {moment}"
    for stage, entry in contents(out).get("stages.json", {}).items():
        assert entry == expected["stages.json"][stage], f"{stage} after {moment}"


def convert_limited(model: Path, out: Path, data: Path, size: int, said: Path) -> None:
    """Convert with files of `size` bytes at most, and write down the error."""
    run = pipeline.open_model(model, out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        pipeline.convert(run, options(data))
    except MissingResourceError as error:
        said.write_text(str(error))


def test_a_full_disk(tmp_path: Path, pico: Path, data: Path) -> None:
    """A full disk at three points of a conversion; then there is space again."""
    work, said = tmp_path / "work", tmp_path / "said.txt"
    for size, name in ((30_000, "calibration.safetensors"), (400_000, "probes.safetensors"), (2_000_000, "3.60bpw")):
        assert exit_code(convert_limited, pico, work, data, size, said) == 0
        assert name in said.read_text()
        assert "the disk is full" in said.read_text()
        assert list(work.rglob("*.part")) == []
        assert not list(work.glob("*MODE*.gguf"))
    assert (work / "rounded").exists(), "layers that were rounded are not rounded again"


def test_a_shard_that_vanishes(pico: Path, tmp_path: Path, data: Path) -> None:
    model = Path(shutil.copytree(pico, tmp_path / pico.name))
    shard = min(model.glob("*.safetensors"))

    class Vanishing:
        @contextmanager
        def step(self, description: str, total: int, *_: Any, **__: Any) -> Iterator[Advance]:
            if description.startswith("measuring units"):
                shard.unlink(missing_ok=True)
            yield lambda n: None

    run = pipeline.open_model(model, tmp_path / "work", progress=Vanishing())
    folder = run.folder
    with pytest.raises(InputError, match=shard.name):
        pipeline.convert(run, options(data))
    assert set(json.loads(folder.stages.read_text())) == {"calibrate", "probes", "sensitivity"}
    assert not folder.unit_kl.exists()
    log = folder.log.read_text()
    assert "calibrate: done in" in log
    assert f"ERROR   {shard}" in log
    shutil.copy(pico / shard.name, shard)
    recipe = options(data)
    recipe = replace(recipe, validation=replace(recipe.validation, validate=False))
    seconds = pipeline.convert(pipeline.open_model(model, tmp_path / "work"), recipe).seconds
    assert seconds["sensitivity"] == 0 < seconds["unit-kl"]
