"""Every file of a checkpoint, damaged: converted, or refused in one line, as a rule by the dry run too."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mode_gguf_cli.main import main
from tests.e2e.conftest import samples
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

EXAMPLES = int(os.environ.get("MODE_GGUF_MUTATIONS", "40"))
REFUSALS = {2, 3, 4}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**40, 10**30, -0.5, 0.5, 1e300, float("nan"), float("inf")),
    *("", "x", "\ud800", "{{ 1 / 0 }}", "../../x", "a" * 3000, "\x00", "\n---\n"),
    *([], [1], ["x"], [[]], {}, {"x": 1}, {"a": {"b": []}}, [None], [0.5, "x"]),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ASKED = ("--bpw", "4", *samples(1, 1), "--preset", "paper", "--no-validate", "--threads", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("whole") / "whole")


def mutated_json(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON with one value changed, left out, or in the place of another; strings may be halves of characters."""
    root = json.loads(content)
    parent, key, value = {"": root}, "", root
    while isinstance(value, dict | list) and value and (parent == {"": root} or draw(st.booleans())):
        parent, value = value, None
        key = (
            draw(st.sampled_from(sorted(parent))) if isinstance(parent, dict) else draw(st.integers(0, len(parent) - 1))
        )
        value = parent[key]
    how = draw(st.sampled_from(["value", "value", "value", "remove", "number", "nested"]))
    if how == "remove":
        del parent[key]
    elif how == "number" and isinstance(value, int | float):
        parent[key] = draw(
            st.sampled_from([value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value)])
        )
    elif how == "nested":
        parent[key] = {str(key): value}
    else:
        parent[key] = draw(st.sampled_from(VALUES))
    return json.dumps(root).encode()


def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut off, emptied, with other bytes in it, or replaced by something else."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "empty", "pointer", "spaces", "repeat"]))
    place = draw(st.integers(0, max(0, min(len(content), 1 << 16) - 1)))
    if how == "cut":
        return content[:place]
    if how == "flip":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if how == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
    return {"empty": b"", "pointer": LFS_POINTER, "spaces": b"  \n", "repeat": content + content}[how]


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, Callable[[Path], None]]:
    """A file's name, and what is done to it."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "README.md")
    weights = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    name = draw(st.sampled_from((*names, names[0], "generation_config.json", *weights)))
    how = draw(st.sampled_from(["json", "json", "json", "bytes", "remove", "folder"]))
    if how in ("remove", "folder"):

        def gone(path: Path) -> None:
            path.unlink(missing_ok=True)
            if how == "folder":
                path.mkdir()

        return name, gone
    changed = (mutated_json if how == "json" and name.endswith(".json") else mutated_bytes)(draw, CONTENT[name])
    return name, lambda path: path.write_bytes(changed) and None


CONTENT: dict[str, bytes] = {}
"""Files of the checkpoint by name, read once."""


@pytest.fixture(scope="module", autouse=True)
def content(whole: Path) -> None:
    (whole / "generation_config.json").write_text(json.dumps({"top_k": 20, "top_p": 0.8, "eos_token_id": [1]}))
    CONTENT.update({path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()})


def test_damage_is_converted_or_refused(
    whole: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mode-gguf", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0), capsys.readouterr().err

    @settings(
        max_examples=EXAMPLES,
        derandomize="MODE_GGUF_MUTATIONS" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutation=mutations())
    def check(mutation: tuple[str, Callable[[Path], None]]) -> None:
        name, change = mutation
        place = tmp_path_factory.mktemp("damaged")
        folder, out = Path(shutil.copytree(whole, place / "model")), place / "out"
        change(folder / name)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        codes = []
        for asked in (("--dry-run",), ()):
            code, said = ended("convert", folder, "--out", out, *ASKED, *asked)
            assert code in {0, *REFUSALS}, (name, said)
            assert len([line for line in said.splitlines() if line.startswith("error:")]) == bool(code), (name, said)
            assert "Traceback" not in said, (name, said)
            codes.append(code)
        dry, real = codes
        assert dry == real or (dry == 0 and name.endswith(".safetensors")), (name, codes, said)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, name
        assert not list(place.rglob(".*.part"))
        assert bool(list(out.glob("model-MODE-*.gguf"))) == (real == 0)
        shutil.rmtree(place)

    check()
