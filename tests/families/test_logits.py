"""Every family in the embedded llama.cpp against transformers, in F32: tokens, texts, and answers about a picture."""

from pathlib import Path

import pytest
from PIL import Image

from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.validation.divergence import Scores, compare
from tests.families.cases import cases_with, each_of, every_case
from tests.families.conftest import Families, exact
from tests.families.family_case import FamilyCase, StockDifference
from tests.families.gguf_copy import gguf_copy
from tests.families.prompts import ANSWER, QUESTION, TEXT, Reference, waves

SPELLINGS = {
    "marks": "नमस्ते दुनिया! ก็ได้ ‏שָׁלוֹם",
    "digits": "1234567 89 I'LL don't  \n\n x",
    "words": "camelCase HTTPServer ÉCOLE école नमस्ते a/b//c\n\n 1234 it's DON'T  \t x",
    "space": "a\n\n b  c",
    "pictograms": "naïve 🙂 ▁ x",
}
"""What tells pre-tokenizers from each other."""


def prompt(case: FamilyCase, model: LlamaModel) -> str:
    return model.chat_template.question(case.before_question + QUESTION, model.image_marker)


def text_scores(reference: Reference, model: LlamaModel, tokens: list[int]) -> Scores:
    return compare(reference.logits(tokens[:-1]), model.text_logits(tokens[:-1]), tokens[1:])


def image_scores(
    case: FamilyCase, reference: Reference, model: LlamaModel, picture: Image.Image, *, half_pixels: bool = False
) -> Scores:
    """Of an answer; `half_pixels` gives transformers the pixels in F16, as ggml's im2col takes them."""
    tokens, image = case.ask(reference, picture)
    if half_pixels:
        image["pixel_values"] = image["pixel_values"].half().float()
    answer = reference.tokens(ANSWER)
    expected = reference.logits(tokens + answer[:-1], image)[len(tokens) - 1 :]
    return compare(expected, model.logits(prompt(case, model), answer, picture), answer)


@every_case
def test_text_logits(case: FamilyCase, families: Families) -> None:
    reference, model = families.reference(case), families.llama(case)
    text = TEXT * case.text_repeats
    tokens = [*model.beginning, *reference.tokens(text)]
    assert [*model.beginning, *model.tokenize(text)] == tokens
    assert len(tokens) > case.text_length
    scores = text_scores(reference, model, tokens)
    assert scores.kl.max() < case.text_kl
    assert scores.same_top1.all()


@every_case
@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_tokens(case: FamilyCase, text: str, families: Families) -> None:
    assert families.llama(case).tokenize(text) == families.reference(case).tokens(text)


@every_case
def test_special_tokens(case: FamilyCase, families: Families) -> None:
    """Of the chat template, and around a picture."""
    reference = families.reference(case)
    chat = [{"role": "user", "content": "Hi"}]
    text = reference.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text += "{}user\n{}Hi".format(*case.marks)
    assert families.llama(case).tokenize(text) == reference.tokens(text)


@every_case
def test_image_logits(case: FamilyCase, families: Families) -> None:
    for size in case.pictures:
        scores = image_scores(case, families.reference(case), families.llama(case), waves(size))
        print(f"KL of a picture of {size}: {scores.kl.mean():.3g} nats")
        assert case.image_average(scores.kl) < case.image_kl, size
        assert scores.same_top1.all(), size


@cases_with("rounded")
def test_image_difference_is_rounding_inside_llama_cpp(case: FamilyCase, families: Families) -> None:
    """ggml takes pixels in F16 (im2col) and reads GELU from an F16 table; with that, transformers says the same."""
    rounded = families.load(case)
    assert case.rounded is not None
    case.rounded(rounded)
    model = families.llama(case)
    for size in case.pictures:
        near = image_scores(case, families.reference(case, rounded), model, waves(size), half_pixels=True)
        assert near.kl.mean() < 1e-7, size
        assert near.kl.max() < case.rounded_kl, size
        assert near.kl.mean() < 0.5 * image_scores(case, families.reference(case), model, waves(size)).kl.mean(), size


@every_case
def test_greedy_tokens(case: FamilyCase, families: Families) -> None:
    picture = waves(case.pictures[0])
    reference, model = families.reference(case), families.llama(case)
    expected = reference.greedy(*case.ask(reference, picture), n=12)
    assert model.generate(prompt(case, model), picture, max_tokens=12) == expected


@each_of("stock", "difference")
def test_stock_conversion_is_further_away(
    case: FamilyCase, difference: StockDifference, families: Families, tmp_path: Path
) -> None:
    """Our own file with what llama.cpp's converter writes instead."""
    files = dict(zip(("text", "mmproj"), families.files(case), strict=True))
    files[difference.file] = gguf_copy(
        files[difference.file],
        tmp_path / "stock.gguf",
        left_out=difference.left_out,
        rewritten=difference.rewritten,
    )
    reference = families.reference(case)
    with exact(*files.values()) as model:
        if difference.file == "text":
            kl = text_scores(reference, model, [*model.beginning, *reference.tokens(TEXT * case.text_repeats)]).kl
        else:
            kl = image_scores(case, reference, model, waves(case.pictures[0])).kl
    print(f"KL of stock conversion: {kl[difference.unharmed :].mean():.3g} nats")
    assert kl[: difference.unharmed].max(initial=0) < case.text_kl
    assert kl[difference.unharmed :].mean() > difference.kl
