"""Several pictures in one chat, of every family: each in its place, none disturbing what comes before it."""

import torch
from PIL import Image

from mode_gguf.data.sample import Message, Sample
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from tests.calibration.conftest import noise_image
from tests.families.cases import every_case
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase

FIRST, OTHER, THIRD = noise_image(0), noise_image(1, 96, 160), noise_image(2, 96, 160)


def asked(builder: InputBuilder, *pictures: Image.Image) -> ModelInputs:
    """A question between the first picture and the others, and its answer."""
    question = "What colour is it? And the other one?"
    places = (0, *[len("What colour is it? ")] * (len(pictures) - 1))
    messages = (Message("user", question, places), Message("assistant", "The square is red."))
    return builder.build(Sample("several", "tests", messages=messages, image=pictures))


@every_case
def test_every_picture_has_its_place(case: FamilyCase, families: Families) -> None:
    # As many pixels each, however many there are: they share what there is.
    checkpoint, model = families.checkpoint(case.layouts[0]), families.model(case)
    one = InputBuilder.open(checkpoint, max_image_pixels=1 << 14)
    two = InputBuilder.open(checkpoint, max_image_pixels=1 << 15)
    alone, both, changed = asked(one, FIRST), asked(two, FIRST, OTHER), asked(two, FIRST, THIRD)
    apart = asked(one, OTHER)
    assert both.is_vision.sum() == alone.is_vision.sum() + apart.is_vision.sum()
    assert torch.equal(both.input_ids, changed.input_ids)
    text = two.tokenizer.decode(both.input_ids[both.is_query])
    assert text.startswith("And the other one?")
    assert text.endswith("The square is red.")
    assert two.tokenizer.decode(both.input_ids[both.scored + 1]) == "The square is red."
    places = torch.nonzero(both.is_vision)[:, 0]
    between = two.tokenizer.decode(both.input_ids[int(places[0]) : int(places[-1])])
    assert "What colour is it?" in between
    assert "And the other one?" not in between

    def logits(inputs: ModelInputs) -> torch.Tensor:
        with torch.no_grad():
            arguments = inputs.model_arguments(torch.device("cpu"), torch.float32)
            return torch.as_tensor(model(**arguments).logits[0])

    of_both, of_alone, of_changed = logits(both), logits(alone), logits(changed)
    before = int((both.input_ids[: len(alone.input_ids)] == alone.input_ids).int().cumprod(0).sum())
    assert before > int(torch.nonzero(alone.is_vision)[-1])
    torch.testing.assert_close(of_both[:before], of_alone[:before], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of_both[:before], of_changed[:before], rtol=1e-3, atol=1e-4)
    assert (of_both[-1] - of_changed[-1]).abs().max() > 1e-4
