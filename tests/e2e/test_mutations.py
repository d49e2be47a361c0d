"""Every file of a checkpoint, damaged: converted, or refused in one line, as a rule by the dry run too."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mode_gguf_cli.main import main
from tests.e2e.conftest import samples
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

Damage: TypeAlias = bytes | str
"""Other bytes, or `gone`, or `folder`."""

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
    parent: Any = {"": root}
    key: Any = ""
    while isinstance(parent[key], dict | list) and parent[key] and (parent == {"": root} or draw(st.booleans())):
        parent = parent[key]
        key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    how, value = draw(st.sampled_from(["value", "value", "value", "remove", "number", "nested"])), parent[key]
    if how == "remove":
        del parent[key]
    elif how == "number" and isinstance(value, int | float):
        others = [value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value)]
        parent[key] = draw(st.sampled_from(others))
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
def mutations(draw: st.DrawFn) -> tuple[str, Damage]:
    """A file's name, and what it holds instead."""
    settings = [name for name in CONTENT if not name.startswith("model")]
    name = draw(st.sampled_from([*settings, *CONTENT, "config.json", "config.json", "preprocessor_config.json"]))
    how = draw(st.sampled_from(["json", "json", "json", "bytes", "gone", "folder"]))
    if how in ("gone", "folder"):
        return name, how
    changed = mutated_json if how == "json" and name.endswith(".json") else mutated_bytes
    return name, changed(draw, CONTENT[name])


def damage(path: Path, by: Damage) -> None:
    path.unlink()
    if by == "folder":
        path.mkdir()
    elif isinstance(by, bytes):
        path.write_bytes(by)


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
    def check(mutation: tuple[str, Damage]) -> None:
        name, by = mutation
        place = tmp_path_factory.mktemp("damaged")
        folder, out = Path(shutil.copytree(whole, place / "model")), place / "out"
        damage(folder / name, by)
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
