"""What only InternVL has: two layouts, tiles, marks in the text, and a larger vision tower of another form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration

from mode_gguf.architectures import find_family, projector_tensors
from mode_gguf.architectures.images import ImagePlace, scaled_size
from mode_gguf.architectures.vision import internvl
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.model_config import model_config
from mode_gguf.forward.streaming import open_streamed
from tests.families.case.internvl import INTERNVL
from tests.families.changed import changed
from tests.families.conftest import Families
from tests.families.pico.internvl import BLOCKS, MAX_TILES, SIDE, VISION_HIDDEN, Layout, mark_id, write_pico_internvl
from tests.forward.test_streaming import assert_streamed_is_plain

IMAGE = mark_id("<IMG_CONTEXT>")


@pytest.fixture
def checkpoint(pico_internvl: Path) -> Checkpoint:
    return Checkpoint.open(pico_internvl)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger tower has the size of the pico one."""
    monkeypatch.setattr(internvl, "RMS_WIDTH", VISION_HIDDEN)
    monkeypatch.setattr(internvl, "RMS_BLOCKS", BLOCKS)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_larger_vision_tower(layout: Layout, tmp_path: Path) -> None:
    """Every parameter of transformers' model is in the checkpoint, and all of them in the file."""
    checkpoint = Checkpoint.open(write_pico_internvl(tmp_path, layout=layout, large=True))
    family = find_family(checkpoint)
    tensors = {tensor.name: tensor for tensor in projector_tensors(checkpoint)}
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig.from_dict(dict(family.layout.model_config(checkpoint))))
    read = {
        name: family.layout.read_parameter(checkpoint, name)
        for name, _ in model.named_parameters()
        if name.startswith(("model.vision_tower", "model.multi_modal_projector"))
    }
    assert len(read) == len(tensors)
    for name, special in read.items():
        values = checkpoint.read(family.layout.stored_name(name)) if special is None else special
        assert values.shape == model.get_parameter(name).shape
    source = "model.vision_tower.encoder.layer.3.attention"
    for norm in ("q_norm", "k_norm"):
        assert tensors[f"v.blk.3.attn_{norm}.weight"].sources == (family.layout.stored_name(f"{source}.{norm}.weight"),)
    assert "v.blk.0.ln1.bias" not in tensors
    assert "v.blk.0.attn_q.bias" not in tensors
    assert "v.blk.0.attn_out.bias" in tensors


@pytest.mark.usefixtures("large")
def test_streamed_forward_with_the_larger_vision_tower(families: Families, tmp_path: Path) -> None:
    """In its authors' layout, against transformers' own loading of the other one."""
    checkpoint = Checkpoint.open(write_pico_internvl(tmp_path / "original", large=True))
    stored = write_pico_internvl(tmp_path / "transformers", layout="transformers", large=True)
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(sample) for sample in families.samples[2:4]]
    assert_streamed_is_plain(
        open_streamed(checkpoint, "cpu"), inputs, INTERNVL.load(stored, checkpoint), atol=INTERNVL.streamed_atol
    )


def test_both_layouts_make_one_configuration(families: Families) -> None:
    configs: list[dict[str, Any]] = []
    for layout in INTERNVL.layouts:
        checkpoint = families.checkpoint(layout)
        config = model_config(checkpoint, find_family(checkpoint)).to_dict()
        del config["transformers_version"], config["vision_config"]["architectures"]
        configs.append(config)
    assert configs[0] == configs[1]


def test_prompts_of_both_layouts_are_the_same(families: Families) -> None:
    """The authors' template knows only text, transformers' writes the image token; llama.cpp adds the same marks."""
    both = [families.inputs(layout) for layout in INTERNVL.layouts]
    for ours, theirs in zip(*both, strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.scored.tolist() == theirs.scored.tolist()
    shown, tokenizer = both[0][2], families.reference(INTERNVL).tokenizer
    image = "<img>" + "<IMG_CONTEXT>" * 28 + "</img>\nWhat colour is the square?<|im_end|>"
    assert tokenizer.decode(shown.input_ids).startswith(f"<|im_start|>user\n{image}")
    first = int(torch.nonzero(shown.is_query)[0])
    assert tokenizer.decode(shown.input_ids[first:]).startswith("What")


@pytest.mark.parametrize(
    ("size", "max_pixels", "n_tiles"), [((56, 40), 10**6, 1), ((120, 60), 10**6, 7), ((120, 60), 1000, 1)]
)
def test_a_picture_takes_its_place(
    checkpoint: Checkpoint, families: Families, size: tuple[int, int], max_pixels: int, n_tiles: int
) -> None:
    picture, family = Image.new("RGB", size, (255, 0, 128)), find_family(checkpoint)
    tokenizer = families.reference(INTERNVL).tokenizer
    placed = family.vision.place_image(ImagePlace(checkpoint, picture, None, tokenizer, IMAGE, max_pixels))
    assert placed.tokens == [mark_id("<img>"), *[IMAGE] * (4 * n_tiles), mark_id("</img>")]
    assert family.vision.image_tokens is not None
    assert family.vision.image_tokens(checkpoint, scaled_size(size, max_pixels)) == 4 * n_tiles
    assert family.vision.image_tokens(checkpoint, None) == 4 * (MAX_TILES + 1)
    pixels = placed.arguments["pixel_values"]
    assert pixels.shape == (n_tiles, 3, SIDE, SIDE)
    assert pixels.dtype == np.float32
    red, green, blue = pixels[-1].mean(axis=(1, 2))
    assert red == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    assert green == pytest.approx((0 - 0.456) / 0.224, rel=1e-5)
    assert blue == pytest.approx((128 / 255 - 0.406) / 0.225, rel=1e-5)


def test_a_tokenizer_without_image_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Which may be named in either file, or in both."""
    other, family = changed(checkpoint.path, tmp_path / "other"), find_family(checkpoint)
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
        assert family.vision.image_token(other) == IMAGE
        path = other.path / name
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the tokenizer has no added token <IMG_CONTEXT>"):
        family.vision.image_token(other)


def test_a_tokenizer_without_marks(pico: Path, checkpoint: Checkpoint) -> None:
    tokenizer, picture = AutoTokenizer.from_pretrained(pico), Image.new("RGB", (56, 56))
    with pytest.raises(InputError, match=r"the tokenizer lacks <img> or </img>"):
        find_family(checkpoint).vision.place_image(ImagePlace(checkpoint, picture, None, tokenizer, IMAGE, 10**6))
