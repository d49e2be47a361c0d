"""Samples through the commands: what is read, what is passed over, and that what is broken is refused at once."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.conftest import QUICK, Run


def write_rows(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def chat(question: str, **more: object) -> dict[str, object]:
    return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    Image.new("RGB", (80, 48), "blue").save(folder / "blue.png")
    return folder


def counts(run: Run, pico: Path, source: Path, *options: str) -> dict[str, int]:
    """What `calibrate` says of its samples."""
    said = run("calibrate", pico, "--calibration", source, "--out", source.parent / "work", "--json", *options)
    found: dict[str, int] = json.loads(said)["samples"]
    return found


def test_pictures_of_all_forms_are_calibrated_on(data: Path, pico: Path, run: Run) -> None:
    parts = [{"type": "text", "text": "Same?"}, *({"type": "image", "path": f"{name}.png"} for name in ("red", "blue"))]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]
    (data / "array.json").write_text(json.dumps([chat("<image>What?", image="red.png")] * 2, indent=1))
    write_rows(
        data / "rows.jsonl",
        {"messages": messages},
        chat("<image> or <image>?", images=["red.png", "blue.png"]),
        chat("<video>What?", video="v.mp4"),
        {"text": "A plain text of some length."},
    )
    found = counts(run, pico, data)
    assert (found["image_samples"], found["text_samples"]) == (4, 1)
    alone = counts(
        run, pico, write_rows(data.parent / "alone" / "rows.jsonl", chat("What?", image=str(data / "red.png")))
    )
    assert found["vision_tokens"] > 4 * alone["vision_tokens"]


def test_a_text_without_end_takes_no_longer(data: Path, pico: Path, run: Run) -> None:
    """The tokens are those of its beginning."""
    sentence = "The quick brown fox jumps over the lazy dog. "
    rows = [{"text": sentence * 300_000}, {"messages": [{"role": "user", "content": sentence * 300_000}]}]
    found = counts(run, pico, write_rows(data / "long.jsonl", *rows))
    assert found["text_tokens"] == 2 * 512
    assert counts(run, pico, write_rows(data / "short.jsonl", *({"text": sentence * 300},) * 2)) == found


BROKEN: dict[str, tuple[Any, str]] = {
    "missing": (chat("What?", image="gone.png"), "rows.jsonl:2: image .*gone.png does not exist"),
    "damaged": (chat("What?", image="damaged.png"), "rows.jsonl:2: image .*damaged.png: cannot be read as an image"),
    "narrow": (chat("What?", image="narrow.png"), "narrow.png: 1 x 300 pixels, one side may be 200 times"),
    "a pipe": (chat("What?", image="pipe.png"), "rows.jsonl:2: image .*pipe.png is no regular file"),
    "on the web": (chat("What?", image="https://example.org/a.png"), "rows.jsonl:2: .* not fetched from addresses"),
    "no form": ({"prompt": "What?"}, "rows.jsonl:2: neither `text` nor a list of `conversations`"),
    "no user": ({"messages": [{"role": "assistant", "content": "That."}]}, "rows.jsonl:2: .*no turn from `human`"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", [("calibrate",), ("convert", "--dry-run"), ("convert",)], ids=" ".join)
def test_broken_samples_are_refused_at_once(
    name: str, command: tuple[str, ...], data: Path, pico: Path, run: Run, tmp_path: Path
) -> None:
    row, message = BROKEN[name]
    (data / "damaged.png").write_bytes((data / "red.png").read_bytes()[:60])
    Image.new("RGB", (1, 300)).save(data / "narrow.png")
    os.mkfifo(data / "pipe.png")
    path = write_rows(data / "rows.jsonl", chat("What?", image="red.png"), row)
    out = tmp_path / "work"
    budget = ("--bpw", "4.5", *QUICK[:4]) if command[0] == "convert" else ()
    said = run(*command, pico, "--calibration", path, "--out", out, *budget, code=4)
    assert re.search(message, said)
    assert not [file for file in out.rglob("*") if file.suffix in (".gguf", ".safetensors", ".html")]


def held_out(folder: Path, *pictures: object) -> Path:
    """A held-out folder that asks about pictures."""
    write_rows(folder / "text.jsonl", {"text": "The quick brown fox jumps over the lazy dog."})
    write_rows(folder / "questions.jsonl", *({"image": str(one), "question": "What colour?"} for one in pictures))
    return folder


@pytest.mark.parametrize("kind", ["absolute", "above", "link", "linked folder", "linked questions", "gone", "a pipe"])
def test_convert_reads_the_held_out_set_first(kind: str, data: Path, pico: Path, run: Run, tmp_path: Path) -> None:
    """Nothing outside its folder is read, nor anything else computed before."""
    folder = tmp_path / "held-out"
    folder.mkdir()
    (folder / "link.png").symlink_to(data / "red.png")
    (folder / "linked").symlink_to(data)
    os.mkfifo(folder / "pipe.png")
    named: dict[str, object] = {
        "absolute": data / "red.png",
        "above": "../data/red.png",
        "link": "link.png",
        "linked folder": "linked/red.png",
        "gone": "gone.png",
        "a pipe": "pipe.png",
    }
    held_out(folder, named.get(kind, "red.png"))
    if kind == "linked questions":
        (folder / "questions.jsonl").rename(data / "questions.jsonl")
        (folder / "questions.jsonl").symlink_to(data / "questions.jsonl")
    out = tmp_path / "work"
    said = run("convert", pico, "--bpw", "4.5", "--samples", folder, "--out", out, *QUICK, code=4)
    if kind in ("gone", "a pipe"):
        assert "questions.jsonl:1: " in said
        assert "lies outside" not in said
    else:
        assert "lies outside" in said
        assert "--allow-outside-samples" in said
    assert not [file for file in out.rglob("*") if file.suffix in (".gguf", ".safetensors", ".html")]


def test_held_out_texts_that_are_too_short(pico: Path, run: Run, tmp_path: Path) -> None:
    folder = held_out(tmp_path / "held-out")
    write_rows(folder / "text.jsonl", {"text": "A longer one."}, {"text": "a"})
    for command in (("convert", "--dry-run"), ("convert",)):
        said = run(*command, pico, "--bpw", "4.5", "--samples", folder, "--out", tmp_path / "work", *QUICK, code=4)
        assert "held-out set held-out: text 'a' is shorter than two tokens" in said
    assert not list(tmp_path.rglob("*.safetensors"))
