"""Calibration samples: the built-in set, folders, files, and everything that can be wrong with them."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mode_gguf.data import hub_dataset
from mode_gguf.data.default_calibration import default_samples
from mode_gguf.data.passed_over import PassedOver
from mode_gguf.data.sample import Message, Sample
from mode_gguf.data.samples import load_samples, split_text
from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.validation.default_held_out import default_held_out


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "my-data"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(data / "images" / "red.png")
    write_lines(
        data / "chats.jsonl",
        {"image": "images/red.png", "conversations": turns("<image>\nWhat colour?", "Red.")},
        "",
        {"conversations": turns("Say hello.", "Hello.")},
        {"text": "A plain text."},
    )
    (data / "prose.txt").write_text("First paragraph.\n\n" * 20)
    return data


def test_built_in_set_is_large_varied_and_the_same_every_time() -> None:
    first, second = load_samples(), load_samples()
    images = [sample for sample in first if sample.has_image]
    assert len(images) >= 64
    assert len(first) - len(images) >= 64
    assert len({sample.messages[0].text for sample in images}) >= 15
    assert [sample.origin for sample in first] == [sample.origin for sample in second]
    assert all(a.open_image() == b.open_image() for a, b in zip(images, second, strict=False))
    assert {sample.dataset for sample in first} == {"mode-gguf built-in"}


def test_folder_gives_all_its_files(folder: Path) -> None:
    samples = load_samples(str(folder), text_tokens=20)
    assert samples[0] == Sample(
        origin=f"{folder / 'chats.jsonl'}:1",
        dataset="my-data",
        messages=(Message("user", "What colour?"), Message("assistant", "Red.")),
        image=folder / "images" / "red.png",
    )
    assert samples[0].open_image().getpixel((0, 0)) == (255, 0, 0)
    assert [sample.text for sample in samples[1:3]] == [None, "A plain text."]
    pieces = [sample.text for sample in samples[3:]]
    assert "".join(str(piece) for piece in pieces) == (folder / "prose.txt").read_text()
    assert len(pieces) > 3


def test_single_files(folder: Path) -> None:
    assert len(load_samples(str(folder / "chats.jsonl"))) == 3
    assert load_samples(str(folder / "prose.txt"))[0].dataset == "prose"


def test_limits_draw_the_same_samples_for_a_seed(folder: Path) -> None:
    def origins(seed: int) -> list[str]:
        chosen = load_samples(str(folder), max_image_samples=0, max_text_samples=4, text_tokens=10, seed=seed)
        return [sample.origin for sample in chosen]

    assert len(origins(1)) == 4
    assert origins(1) == origins(1)
    assert any(origins(1) != origins(seed) for seed in range(2, 6))


@pytest.mark.parametrize("limits", [(0, 0), (-1, 3)])
def test_senseless_limits(limits: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="sample limits"):
        load_samples(max_image_samples=limits[0], max_text_samples=limits[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"bad\.jsonl:2: not valid JSON"),
        ([1, 2], r"bad\.jsonl:2: a JSON object was expected"),
        ({"id": 3}, r"bad\.jsonl:2: neither `text` nor"),
        ({"text": "  "}, r"bad\.jsonl:2: `text` must be"),
        ({"image": 7, "conversations": turns("a", "b")}, r"bad\.jsonl:2: `image` must be a path"),
        ({"image": "gone.png", "conversations": turns("a", "b")}, r"bad\.jsonl:2: image .*gone\.png does not exist"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"bad\.jsonl:2: a turn needs `from`"),
        ({"conversations": ["x"]}, r"bad\.jsonl:2: a turn of the conversation"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, r"bad\.jsonl:2: .*no turn from `human`"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", {"text": "fine"}, line)
    with pytest.raises(InputError, match=message):
        load_samples(str(path))


def test_broken_image_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but not really")
    path = write_lines(tmp_path / "x.jsonl", {"image": "broken.png", "conversations": turns("a", "b")})
    with pytest.raises(InputError, match=r"x\.jsonl:1: image .*broken\.png: cannot be read"):
        load_samples(str(path))


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"x\.txt: cannot be read as UTF-8"):
        load_samples(str(tmp_path))


def test_empty_folder_and_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.json, no \*\.jsonl and no \*\.txt"):
        load_samples(str(tmp_path))
    with pytest.raises(MissingResourceError, match="no such file or folder"):
        load_samples(str(tmp_path / "gone"))


def test_data_set_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingResourceError, match=r"mode-gguf\[datasets\]"):
        load_samples("owner/some-set")


class _Stream(list[object]):
    def shuffle(self, seed: int, buffer_size: int) -> "_Stream":
        return _Stream(reversed(self))


class _Datasets:
    """Stands in for the `datasets` package, which may not be installed."""

    @staticmethod
    def load_dataset(name: str, split: str, streaming: bool) -> _Stream:
        if name == "owner/offline":
            raise ConnectionError("no route to host\nlong details")
        rows = [{"text": "one"}, {"image": Image.new("RGB", (4, 4)), "conversations": turns("What?", "That.")}]
        return _Stream(rows if name == "owner/good" else [])


def test_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets)
    image, text = load_samples("owner/good")
    assert (image.dataset, image.messages[1].text, text.text) == ("owner/good", "That.", "one")
    assert image.open_image().size == (4, 4)
    with pytest.raises(MissingResourceError, match=r"owner/offline: .*\(no route to host\)"):
        load_samples("owner/offline")
    with pytest.raises(InputError, match="train split is empty"):
        hub_dataset.read_hub_dataset("owner/empty", limit=3, seed=0, passed_over=PassedOver())


@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 30))
def test_cutting_loses_only_blank_pieces(text: str, size: int) -> None:
    pieces = list(split_text(text, size))
    assert all(0 < len(piece) <= size for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_built_in_pictures_are_not_those_that_validation_asks_about() -> None:
    used = {sample.origin.rpartition(" ")[2] for sample in default_samples()}
    asked = {question.image.name for question in default_held_out().questions}
    assert asked
    assert not asked & used
