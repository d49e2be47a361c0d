"""Model inputs of samples, without torchvision."""

from pathlib import Path

import pytest
import torch

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from tests.calibration.conftest import noise_image


@pytest.fixture(scope="module")
def builder(pico: Path) -> InputBuilder:
    return InputBuilder.open(Checkpoint.open(pico))


def predicted(builder: InputBuilder, inputs: ModelInputs) -> str:
    """The tokens that the scored positions predict."""
    following = inputs.scored + 1
    return str(builder.tokenizer.decode(inputs.input_ids[following[following < len(inputs.input_ids)]]))


def chat(question: str, answer: str | None) -> Sample:
    messages = (Message("user", question),) + ((Message("assistant", answer),) if answer else ())
    return Sample("here", "tests", messages=messages, image=noise_image(0))


def test_text_scores_every_position_that_has_a_next_token(builder: InputBuilder) -> None:
    inputs = builder.build(Sample("t", "tests", text="The quick brown fox"))
    assert inputs.scored.tolist() == list(range(len(inputs.input_ids) - 1))
    assert not inputs.is_vision.any()
    assert not inputs.has_image
    assert builder.tokenizer.decode(inputs.input_ids) == "The quick brown fox"


def test_image_sample_scores_its_answer_and_asks_with_its_messages(builder: InputBuilder) -> None:
    inputs = builder.build(chat("What colour is it?", "It is red."))
    assert predicted(builder, inputs) == "It is red."
    assert builder.tokenizer.decode(inputs.input_ids[inputs.is_query]) == "What colour is it?It is red."
    assert int(inputs.is_vision.sum()) == int(inputs.image["image_grid_thw"].prod()) // 4 == 8 * 6 // 4
    arguments = inputs.model_arguments(torch.device("cpu"), torch.float32)
    assert torch.equal(arguments["mm_token_type_ids"][0].bool(), inputs.is_vision)


@pytest.mark.parametrize("answer", ["a", "assistant", "user", "t", "<|im_end|>"])
def test_answers_that_occur_in_the_template(builder: InputBuilder, answer: str) -> None:
    inputs = builder.build(chat("user", answer))
    assert predicted(builder, inputs) == answer
    assert int(inputs.scored.min()) > int(torch.nonzero(inputs.is_query)[0])


def test_prompt_without_answer_scores_the_question_and_the_first_answer_token(builder: InputBuilder) -> None:
    inputs = builder.build(chat("Describe the picture.", None))
    assert predicted(builder, inputs) == "Describe the picture."
    assert int(inputs.scored[-1]) == len(inputs.input_ids) - 1


def test_a_template_that_knows_only_text(pico: Path) -> None:
    """Refused for a family whose templates write the image; see `test_internvl` for one whose do not."""
    builder = InputBuilder.open(Checkpoint.open(pico))
    builder.tokenizer.chat_template = "{% for message in messages %}{{ 'user: ' + message.content }}{% endfor %}"
    with pytest.raises(InputError, match=r"the chat template of .* fails"):
        builder.build(chat("Describe the picture.", None))


def test_long_texts_and_answers_are_cut(pico: Path) -> None:
    builder = InputBuilder.open(Checkpoint.open(pico), max_tokens=30)
    assert len(builder.build(Sample("t", "tests", text="fox " * 100)).input_ids) == 30
    inputs = builder.build(chat("What?", "red " * 100))
    assert len(inputs.input_ids) - int(torch.nonzero(inputs.is_vision)[-1]) - 1 == 30
    assert predicted(builder, inputs).startswith("red red")


def test_answer_that_is_cut_off_altogether(pico: Path) -> None:
    builder = InputBuilder.open(Checkpoint.open(pico), max_tokens=12)
    inputs = builder.build(chat("What colour is it? " * 10, "Red."))
    assert predicted(builder, inputs) == builder.tokenizer.decode(inputs.input_ids[inputs.is_query])
    assert predicted(builder, inputs).startswith("What")


def test_images_are_scaled_down_to_the_limit(pico: Path) -> None:
    builder = InputBuilder.open(Checkpoint.open(pico), max_image_pixels=64 * 64)
    sample = Sample("i", "tests", messages=(Message("user", "What?"),), image=noise_image(0, 640, 640))
    assert int(builder.build(sample).is_vision.sum()) == 4


def test_text_that_is_too_short(builder: InputBuilder) -> None:
    with pytest.raises(InputError, match="t: text is shorter than two tokens"):
        builder.build(Sample("t", "tests", text="a"))


def test_broken_tokenizer(pico: Path, tmp_path: Path) -> None:
    for file in pico.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        InputBuilder.open(Checkpoint.open(tmp_path))
