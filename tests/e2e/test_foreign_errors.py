"""What tokenizers, image processors and configurations raise on files they were not made for is one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.conftest import Run, samples

Change = Callable[[dict[str, Any]], Any]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 11422654\n"


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(pico, tmp_path / "checkpoint"))


def edited(name: str, change: Change) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def replaced(name: str, content: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).write_text(content)

    return replace


def preprocessor(**settings: Any) -> Callable[[Path], None]:
    return edited("preprocessor_config.json", lambda found: found.update(settings))


def sized(part: str, **settings: int) -> Callable[[Path], None]:
    return edited("config.json", lambda config: config[part].update(settings))


SHARD = "model-00001-of-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "model type": (edited("tokenizer.json", lambda t: t["model"].update(type="BPEv2")), "tokenizer.json"),
    "merges of nothing": (edited("tokenizer.json", lambda t: t["model"]["merges"].append(["ab", "zz"])), "tokenizer"),
    "pre-tokenizer": (edited("tokenizer.json", lambda t: t["pre_tokenizer"].update(type="Other")), "tokenizer"),
    "post-processor": (edited("tokenizer.json", lambda t: t.update(post_processor={"type": "X"})), "tokenizer"),
    "no model": (edited("tokenizer.json", lambda t: t.pop("model")), "tokenizer.json: expected a BPE model"),
    "empty tokenizer": (replaced("tokenizer.json", ""), "tokenizer.json: cannot be read as JSON"),
    "tokenizer list": (replaced("tokenizer.json", "[]"), "tokenizer.json: expected a JSON object"),
    "nested tokenizer": (replaced("tokenizer.json", "[" * 100000), "tokenizer.json: cannot be read as JSON"),
    "tokenizer pointer": (replaced("tokenizer.json", POINTER), "tokenizer.json: a Git LFS pointer"),
    "config pointer": (replaced("config.json", POINTER), "config.json: a Git LFS pointer"),
    "settings pointer": (replaced("tokenizer_config.json", POINTER), "tokenizer_config.json: a Git LFS pointer"),
    "weights pointer": (replaced(SHARD, POINTER), f"{SHARD}: a Git LFS pointer"),
    "side": (edited("tokenizer_config.json", lambda c: c.update(padding_side="up")), "tokenizer cannot be read"),
    "special": (edited("tokenizer_config.json", lambda c: c.update(extra_special_tokens=3)), "tokenizer_config.json"),
    "edge left out": (
        edited("preprocessor_config.json", lambda p: p["size"].pop("longest_edge")),
        "image proc",
    ),
    "patches of nothing": (preprocessor(patch_size=0), "patch_size is 0"),
    "negative patches": (preprocessor(patch_size=-16), "patch_size is -16"),
    "patches in words": (preprocessor(patch_size="16"), "patch_size is '16'"),
    "merge": (preprocessor(merge_size=0), "merge_size is 0"),
    "frames": (preprocessor(temporal_patch_size=0), "temporal_patch_size is 0"),
    "huge patches": (preprocessor(patch_size=10**9), "patch_size is 1000000000"),
    "mean": (preprocessor(image_mean=[0.5, 0.5]), "image_mean is"),
    "deviation": (preprocessor(image_std=[0, 0, 0]), "image_std is"),
    "turned limits": (preprocessor(size={"shortest_edge": 4096, "longest_edge": 1024}), "size is"),
    "turned pixels": (preprocessor(min_pixels=4096, max_pixels=1024), "min_pixels is 4096"),
    "huge size": (preprocessor(size={"height": 10**9, "width": 10**9}), "size is"),
    "size in words": (preprocessor(size="large"), "size is 'large'"),
    "unknown processor": (preprocessor(image_processor_type="Other"), "image processor cannot be read"),
    "image token": (edited("config.json", lambda c: c.update(image_token_id=10**6)), "no token 1000000"),
    "negative image token": (edited("config.json", lambda c: c.update(image_token_id=-7)), "no token -7"),
    "wordy config": (edited("config.json", lambda c: c["text_config"].update(rms_norm_eps="x")), "config.json"),
    "layers without end": (sized("text_config", num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected"),
    "experts without end": (sized("text_config", num_experts=10**9), "num_experts is 1000000000, expected"),
    "blocks without end": (sized("vision_config", depth=10**9), "depth is 1000000000, expected"),
    "widths without end": (sized("text_config", hidden_size=10**12), "expected .*1000000000000"),
    "patches without end": (sized("vision_config", patch_size=10**9), "overflowed|expected"),
    "no heads": (sized("text_config", num_key_value_heads=0), "num_key_value_heads|ZeroDivisionError"),
    "heads without end": (sized("text_config", head_dim=10**12), "head_dim|initialise|expected|configuration"),
    "list of settings": (replaced("generation_config.json", "[1]"), "generation_config.json"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(run: Run, copy: Path, tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(copy)
    before = {path: path.read_bytes() for path in copy.iterdir()}
    line = run("calibrate", copy, "--out", tmp_path / "out", *samples(1, 1), code=4)
    assert re.search(says, line), line
    assert str(copy) in line
    assert len(line) < 1000
    assert before == {path: path.read_bytes() for path in copy.iterdir()}


@pytest.mark.parametrize("size", [(1, 300), (4000, 3)])
def test_pictures_that_no_processor_takes_are_named_with_file_and_line(
    run: Run, pico: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    Image.new("RGB", size, "red").save(folder / "p.png")
    chat = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
    (folder / "a.jsonl").write_text("\n" + json.dumps({"image": "p.png", "conversations": chat}))
    line = run("calibrate", pico, "--calibration", folder, "--out", tmp_path / "out", code=4)
    assert re.search(rf"a\.jsonl:2: image .*p\.png: {size[0]} x {size[1]} pixels", line), line


@pytest.mark.parametrize("length", [10**40, 1, 0, -3, "many"])
def test_odd_lengths_in_the_settings_are_harmless(run: Run, copy: Path, tmp_path: Path, length: Any) -> None:
    """Texts are cut at our own length."""
    edited("tokenizer_config.json", lambda c: c.update(model_max_length=length))(copy)
    run("plan", copy, "--uniform", "Q8_0", "--out", tmp_path / "out")
    run("export", copy, "--out", tmp_path / "out")
