"""Calibration samples: the built-in set, folders, files, and everything that can be wrong with them."""

import base64
import io
import json
import os
import re
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


PIXEL = Image.new("RGB", (8, 6), "blue")
ENCODED = io.BytesIO()
PIXEL.save(ENCODED, "PNG")
BASE64 = base64.b64encode(ENCODED.getvalue()).decode()
RED, BLUE = "images/red.png", f"data:image/png;base64,{BASE64}"


def asks(*content: object) -> list[dict[str, object]]:
    """Messages in OpenAI's form."""
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "That."}]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


FORMS: dict[str, tuple[dict[str, object], str, tuple[int, ...], int]] = {
    "ShareGPT4V's": ({"image": RED, "conversations": turns("<image>\nWhat?", "That.")}, "What?", (), 1),
    "null for none": ({"image": None, "conversations": turns("What?", "That.")}, "What?", (), 0),
    "an empty name": ({"image": "", "conversations": turns("What?", "That.")}, "What?", (), 0),
    "an empty list": ({"images": [], "messages": asks(text("What?"))}, "What?", (), 0),
    "a list of one": ({"images": [RED], "conversations": turns("What? <image>", "That.")}, "What?", (), 1),
    "LLaVA's list": (
        {"image": [RED, BLUE], "conversations": turns("<image>\n<image>\nWhich?", "That.")},
        "Which?",
        (),
        2,
    ),
    "marks in the text": (
        {"images": [RED, BLUE], "conversations": turns("Is <image>\nlike <image>\n?", "No.")},
        "Is like ?",
        (3, 8),
        2,
    ),
    "numbered marks": (
        {"images": [RED, BLUE], "conversations": turns("Is <image 1> like <image 2>?", "No.")},
        "Is  like ?",
        (3, 9),
        2,
    ),
    "marks of several tokens": (
        {
            "images": [RED, BLUE],
            "conversations": turns(
                "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>or "
                "<|begin_of_image|><|image|><|end_of_image|>?",
                "No.",
            ),
        },
        "or ?",
        (0, 3),
        2,
    ),
    "both keys for one": (
        {"image": RED, "images": [RED], "conversations": turns("<image>\nWhat?", "That.")},
        "What?",
        (),
        1,
    ),
    "no marks for several": ({"images": [RED, BLUE], "conversations": turns("Which?", "That.")}, "Which?", (), 2),
    "Hugging Face's objects": (
        {
            "images": [{"bytes": None, "path": RED}, {"bytes": BASE64, "path": "x.png"}],
            "messages": asks(text("Which?")),
        },
        "Which?",
        (),
        2,
    ),
    "OpenAI's parts": (
        {"messages": asks(text("What?"), {"type": "image_url", "image_url": {"url": BLUE}})},
        "What?",
        (),
        1,
    ),
    "OpenAI's responses": (
        {"messages": asks({"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": BLUE})},
        "What?",
        (),
        1,
    ),
    "Anthropic's": (
        {
            "messages": asks(
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
                text("What?"),
            )
        },
        "What?",
        (),
        1,
    ),
    "parts that say image": ({"messages": asks({"type": "image", "image": RED}, text("What?"))}, "What?", (), 1),
    "parts that say path": ({"messages": asks({"type": "image", "path": RED}, text("What?"))}, "What?", (), 1),
    "parts that say url": ({"messages": asks({"type": "image", "url": RED}, text("What?"))}, "What?", (), 1),
    "parts that say base64": ({"messages": asks({"type": "image", "base64": BASE64}, text("What?"))}, "What?", (), 1),
    "Qwen's parts": ({"messages": asks({"image": RED}, {"text": "What?"})}, "What?", (), 1),
    "a table's parts": (
        {"images": [RED], "messages": asks({"type": "image", "text": None}, {"type": "text", "text": "What?"})},
        "What?",
        (),
        1,
    ),
    "pictures between texts": (
        {"messages": asks({"type": "image", "image": RED}, text("or "), {"type": "image", "image": BLUE}, text("?"))},
        "or ?",
        (0, 3),
        2,
    ),
    "a mark for a part": (
        {
            "messages": asks(
                {"type": "image", "image": RED}, {"type": "image", "image": BLUE}, text("<image>or <image>?")
            )
        },
        "or ?",
        (0, 3),
        2,
    ),
}
"""Rows; text and places of the pictures in the first turn, and the number of pictures."""


@pytest.mark.parametrize("form", FORMS)
def test_pictures_in_every_form(form: str, folder: Path) -> None:
    row, said, places, n_pictures = FORMS[form]
    (sample,) = load_samples(str(write_lines(folder / "one.jsonl", row)))
    assert (sample.messages[0].text, sample.messages[0].pictures) == (said, places)
    shown = [image.getpixel((0, 0)) for image in sample.open_images()]
    assert len(shown) == n_pictures
    assert n_pictures < 2 or shown == [(255, 0, 0), (0, 0, 255)]


def test_an_address_of_a_file(folder: Path) -> None:
    for address in ((folder / RED).as_uri(), f"file:{folder / RED}"):
        row = {"image": address, "conversations": turns("What?", "Red.")}
        (sample,) = load_samples(str(write_lines(folder / "one.jsonl", row)))
        assert sample.image == folder / RED


def test_a_picture_in_a_later_turn(folder: Path) -> None:
    row = {"image": RED, "conversations": [*turns("Hello.", "Hello."), *turns("What? <image>", "Red.")]}
    (sample,) = load_samples(str(write_lines(folder / "one.jsonl", row)))
    assert [message.pictures for message in sample.turns] == [(), (), (0,), ()]


PROMISES: dict[str, tuple[dict[str, object], str]] = {
    "no picture": ({"conversations": turns("<image>\nWhat?", "A cat.")}, "`<image>` in the text of a row without"),
    "no picture in prose": ({"text": "See <image> there."}, "`<image>` in the text of a row without"),
    "a token": ({"text": "<|vision_start|><|image_pad|><|vision_end|> A cat."}, "image_pad"),
    "too few": ({"image": RED, "conversations": turns("<image><image>What?", "A cat.")}, "not as many marks"),
    "too many": ({"images": [RED, BLUE], "conversations": turns("<image>What?", "A cat.")}, "not as many marks"),
    "out of order": (
        {"images": [RED, BLUE], "conversations": turns("<image 2> or <image 1>?", "A cat.")},
        "count the pictures in their order",
    ),
    "in an answer": ({"image": RED, "conversations": turns("Draw.", "<image>")}, "not the user's"),
    "an empty place": ({"images": [None], "conversations": turns("<image>What?", "A cat.")}, "row without"),
    "a crowd": ({"images": [RED] * 9, "conversations": turns("What?", "A cat.")}, "more than 8 pictures"),
    "a video": ({"video": "v.mp4", "conversations": turns("<video>\nWhat?", "A man.")}, "key `video`"),
    "videos": ({"videos": ["v.mp4"], "messages": asks(text("What?"))}, "key `videos`"),
    "a video's mark": ({"conversations": turns("<video>\nWhat?", "A man.")}, "`<video>` in the text"),
    "a sound's mark": ({"text": "<|AUDIO|> He says hello."}, r"`<\|AUDIO\|>` in the text"),
    "a sound": ({"audio": {"path": "a.wav"}, "text": "He says hello."}, "key `audio`"),
    "image_path": ({"image_path": RED, "conversations": turns("What?", "A cat.")}, "key `image_path`"),
    "image_url": ({"image_url": "https://a.b/c.png", "text": "A cat."}, "key `image_url`"),
    "imageFile": ({"imageFile": RED, "text": "A cat."}, "key `imageFile`"),
    "img": ({"img": RED, "conversations": turns("What?", "A cat.")}, "key `img`"),
    "media": ({"media": [{"type": "video"}], "text": "A cat."}, "key `media`"),
    "a turn's pictures": (
        {
            "messages": [
                {"role": "user", "content": "What?", "images": [BASE64]},
                {"role": "assistant", "content": "A cat."},
            ]
        },
        "key `images`",
    ),
    "a video part": ({"messages": asks({"type": "video", "video": "v.mp4"}, text("What?"))}, "part of type `video`"),
    "a sound part": (
        {"messages": asks({"type": "input_audio", "input_audio": {}}, text("What?"))},
        "part of type `input_audio`",
    ),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_media_that_is_not_loaded_is_counted(promise: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    row, kind = PROMISES[promise]
    path = write_lines(folder / "promises.jsonl", {"text": "A plain text."}, row, row)
    assert [sample.origin for sample in load_samples(str(path))] == [f"{path}:1"]
    load_samples(str(path))
    (warning,) = [one.getMessage() for one in caplog.records]
    assert re.search(rf"rows about media .* 2 with .*{kind}.* \({re.escape(str(path))}:2\)", warning)
    write_lines(path, row)
    with pytest.raises(InputError, match=rf"no calibration sample .* was found \(rows .* 1 with .*{kind}"):
        load_samples(str(path))


def test_what_describes_a_loaded_picture_is_no_promise(folder: Path) -> None:
    row = {"image": RED, "image_id": 7, "image_url": "https://a.b/c", "conversations": turns("<image>What?", "Red.")}
    plain: dict[str, object] = {"text": "A text.", "image_path": None, "videos": [], "has_image": False}
    assert len(load_samples(str(write_lines(folder / "one.jsonl", row, plain)))) == 2


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("https://example.org/cat.png", r"not fetched from addresses"),
        ("ftp://example.org/cat.png", r"not fetched from addresses"),
        ("data:image/png,abc", r"`data:image/TYPE;base64,\.\.\.` expected"),
        ("data:image/png;base64,a", r"no base64"),
        ("data:image/png;base64,AAAA", r"image of 3 bytes: cannot be read"),
        ({"width": 3}, r"found dict"),
        ([[RED]], r"found list"),
        ({"image": {"image": {"image": {"image": RED}}}}, r"found dict"),
        ("images", r"is no regular file"),
        ("a" * 5000, r"does not exist"),
        ("a\0b", r"does not exist"),
    ],
)
def test_pictures_that_cannot_be_had(folder: Path, picture: object, message: str) -> None:
    path = write_lines(folder / "one.jsonl", {"image": picture, "conversations": turns("What?", "Red.")})
    with pytest.raises(InputError, match=rf"one\.jsonl:1: .*{message}") as refused:
        load_samples(str(path))
    assert len(str(refused.value)) < 600


ROWS = [{"image": RED, "conversations": turns("<image>\nWhat?", "Red.")}, {"text": "A plain text."}]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".txt", ".ndjson", ""])
@pytest.mark.parametrize("form", ["array", "indented", "lines", "object with data", "with a BOM", "Windows' lines"])
def test_json_is_told_by_content(folder: Path, form: str, ending: str) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    written = {
        "array": json.dumps(ROWS),
        "indented": json.dumps(ROWS, indent=2),
        "lines": lines,
        "object with data": json.dumps({"version": 1, "data": ROWS}, indent=1),
        "with a BOM": f"\ufeff{lines}",
        "Windows' lines": lines.replace("\n", "\r\n") + "\r\n",
    }[form]
    path = folder / f"rows{ending}"
    path.write_bytes(written.encode())
    samples = load_samples(str(path))
    assert [(sample.has_image, sample.text) for sample in samples] == [(True, None), (False, "A plain text.")]


def test_one_object_is_one_row(folder: Path) -> None:
    (folder / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    (sample,) = load_samples(str(folder / "one.json"))
    assert sample.has_image


def test_prose_stays_prose(folder: Path) -> None:
    for number, prose in enumerate(("[1] A reference.\n", "{braces} in a text\n", '{"a": 1}\n{"b": 2}\n')):
        (folder / f"{number}.txt").write_text(prose)
        assert [sample.text for sample in load_samples(str(folder / f"{number}.txt"))] == [prose]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".txt"])
def test_damage_in_an_array_is_named_by_line(folder: Path, ending: str) -> None:
    path = folder / f"damaged{ending}"
    path.write_text(json.dumps(ROWS, indent=2)[:-20])
    with pytest.raises(InputError, match=rf"damaged\{ending}:1\d: not valid JSON"):
        load_samples(str(path))
    path.write_text(json.dumps([*ROWS, 7]))
    with pytest.raises(InputError, match=rf"damaged\{ending}\[2\]: a JSON object was expected, int found"):
        load_samples(str(path))


def test_a_folder_says_what_it_passes_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "more.json").write_text(json.dumps(ROWS))
    (folder / "dataset_info.json").write_text('{"description": "of something"}')
    for name in ("a.parquet", "b.parquet", "images/unused.png", "README.md", ".hidden"):
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "pipe.jsonl")
    assert sum(sample.has_image for sample in load_samples(str(folder))) == 2
    (warning,) = [one.getMessage() for one in caplog.records]
    for said in ("2 .parquet", "1 .png", "1 .md", "1 .json", "1 .jsonl", "JSON lines"):
        assert said in warning
    assert "hidden" not in warning


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".csv", ".tar"])
def test_tables_are_named_with_the_way_out(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"rows{ending}").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=rf"rows\{ending}: \{ending} files are not read; .*JSON lines"):
        load_samples(str(tmp_path / f"rows{ending}"))
    with pytest.raises(InputError, match=rf"folder holds no .*1 \{ending}.*JSON lines"):
        load_samples(str(tmp_path))


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in (str(tmp_path / "rows.jsonl"), "/dev/zero"):
        with pytest.raises(InputError, match="a file of samples expected"):
            load_samples(source)
    path = write_lines(tmp_path / "x.jsonl", {"image": "rows.jsonl", "conversations": turns("What?", "Red.")})
    with pytest.raises(InputError, match=r"x\.jsonl:1: image .*rows\.jsonl is no regular file"):
        load_samples(str(path))


class _Stream(list[object]):
    def shuffle(self, seed: int, buffer_size: int) -> "_Stream":
        return _Stream(reversed(self))


class _Datasets:
    """Stands in for the `datasets` package, which may not be installed."""

    @staticmethod
    def load_dataset(name: str, split: str, streaming: bool) -> _Stream:
        if name == "owner/offline":
            raise ConnectionError("no route to host\nlong details")
        if name == "owner/media":
            video = {"video": b"x", "text": "A man runs."}
            encoded = {"images": [{"bytes": ENCODED.getvalue(), "path": None}], "messages": asks(text("What?"))}
            return _Stream([encoded, video])
        if name == "owner/paths":
            return _Stream([{"image": RED, "messages": asks(text("What?"))}])
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


def test_media_of_a_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets)
    (sample,) = load_samples("owner/media")
    assert sample.open_image().getpixel((0, 0)) == (0, 0, 255)
    assert "1 with key `video` (owner/media[0])" in caplog.text
    with pytest.raises(InputError, match=r"owner/paths\[0\]: image images/red\.png: names a file"):
        load_samples("owner/paths")


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
