"""What only Kimi's models have: pictures of any size in whole tokens, and positions that are interpolated."""

import pytest
from PIL import Image

from mode_gguf.architectures import find_family
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.checkpoint.folder import Checkpoint
from tests.calibration.conftest import noise_image
from tests.families.case.kimi import KIMI_K25, KIMI_VL
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.test_logits import image_scores


def placed(checkpoint: Checkpoint, size: tuple[int, int], max_pixels: int = 10**7) -> PlacedImage:
    image = Image.new("RGB", size, (255, 0, 0))
    return find_family(checkpoint).vision.place_image(ImagePlace(checkpoint, image, None, None, 7, max_pixels))


def test_positions_of_kimi_vl_are_not_scaled(families: Families) -> None:
    checkpoint = families.checkpoint("pico_kimi_vl")
    assert not [key for key in find_family(checkpoint).text_metadata(checkpoint) if "scaling" in key]


def test_pictures_are_padded_to_whole_tokens_and_scaled_down(families: Families) -> None:
    checkpoint = families.checkpoint("pico_kimi_vl")
    found = placed(checkpoint, (60, 28))
    assert found.arguments["image_grid_thw"].tolist() == [[1, 2, 6]]
    assert list(found.tokens) == [7] * 3
    pixels = found.arguments["pixel_values"]
    assert pixels.shape == (12, 3, 14, 14)
    assert pixels[0, :, 0, 0].tolist() == [1, -1, -1]
    assert pixels[5, :, 0, 0].tolist() == [-1, -1, -1]  # columns 70 on
    rows, columns = placed(checkpoint, (2800, 1400)).arguments["image_grid_thw"][0, 1:]
    assert rows * columns <= 4096 + 2 * (rows + columns)
    assert len(placed(checkpoint, (280, 280), 56 * 56).tokens) <= 4


@pytest.mark.parametrize(("case", "least", "most"), [(KIMI_VL, 1e-6, 0.3), (KIMI_K25, 0, 1e-6)], ids=["vl", "k2.5"])
def test_positions_between_those_of_the_table(case: FamilyCase, least: float, most: float, families: Families) -> None:
    """Kimi K2.5's are interpolated alike; Kimi-VL's llama.cpp takes straight lines where the model has cubics."""
    image = noise_image(1, 176, 112).crop((0, 0, 168, 112))
    scores = image_scores(case, families.reference(case), families.llama(case), image)
    assert least <= scores.kl.mean() < most
