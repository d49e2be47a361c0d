"""A reference's distributions on disk: what they are used for again, with the model and without."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mode_gguf.errors import InputError
from mode_gguf.llama_cpp.gpu_offload import Offload
from mode_gguf.validation.questions import HeldOutSet, load_held_out
from mode_gguf.validation.reference import RECORD, RunSettings, measure_reference, stored_reference
from mode_gguf.validation.validate import ComparedModels, validate
from tests.validation.conftest import Files


def test_without_the_model(
    full: Files, small: Files, held_out_folder: Path, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path
) -> None:
    """The folder alone, with the same samples elsewhere on the disk, gives the same report."""
    kept = tmp_path / "kept"
    first = validate(
        ComparedModels(small.text, full.text, full.mmproj), held_out, settings=settings, reference_folder=kept
    )
    moved = load_held_out(Path(shutil.copytree(held_out_folder, tmp_path / "pictures")))
    placed = replace(settings, threads=2, offload=Offload(main_gpu=1))
    again = validate(ComparedModels(small.text, kept, full.mmproj), moved, settings=replace(placed, threads=1))
    assert again.text == first.text
    assert again.image == first.image
    assert again.reference == first.reference
    assert again.reference is not None
    assert again.reference.name == "pico-F32.gguf"
    assert again.reference_runtime == first.reference_runtime == first.runtime
    assert again.reference_accuracy == first.reference_accuracy


def test_texts_do_not_depend_on_the_projector(
    full: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path
) -> None:
    measure_reference(full.text, full.mmproj, held_out, tmp_path, settings)
    report = validate(ComparedModels(full.text, tmp_path, None), held_out, settings=settings)
    assert report.image is None
    assert report.text is not None
    assert report.text.kl_mean == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "change", [{"answers": "given"}, {"context": 512}, {"max_text_tokens": 20}, {"max_answer_tokens": 3}]
)
def test_other_settings_are_refused(
    full: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path, change: dict[str, int]
) -> None:
    measure_reference(full.text, full.mmproj, held_out, tmp_path, settings)
    stored_reference(tmp_path, held_out, settings)
    with pytest.raises(InputError, match=r"reference-00000\.safetensors: was not measured on a text with these"):
        stored_reference(tmp_path, held_out, replace(settings, **change))  # type: ignore[arg-type]


def test_other_samples_and_folders_are_refused(
    full: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{RECORD}: cannot be read as a stored reference"):
        validate(ComparedModels(full.text, tmp_path, full.mmproj), held_out, settings=settings)
    measure_reference(full.text, full.mmproj, held_out, tmp_path, settings)
    questions = (replace(held_out.questions[0], question="Another?"), *held_out.questions[1:])
    with pytest.raises(InputError, match=r"was not measured on .*questions\.jsonl:1 with"):
        stored_reference(tmp_path, HeldOutSet("other", held_out.texts, questions), settings)


def test_which_answers_are_scored(full: Files, held_out: HeldOutSet, settings: RunSettings, tmp_path: Path) -> None:
    """The reference's own greedy answers, unless the given ones are asked for."""
    own = measure_reference(full.text, full.mmproj, held_out, tmp_path / "own", settings)
    given = measure_reference(full.text, full.mmproj, held_out, tmp_path / "given", replace(settings, answers="given"))
    with settings.load(full.text, full.mmproj) as model:
        for index, question in enumerate(held_out.questions, start=len(held_out.texts)):
            prompt = model.chat_template.question(question.question, model.image_marker)
            greedy = model.generate(prompt, question.image, max_tokens=settings.max_answer_tokens)
            assert own.read(index).tokens == greedy
            assert own.read(index).answer == given.read(index).answer == model.detokenize(greedy).strip()
            if question.answer is not None:
                right = [*model.tokenize(question.answer, special=False), *model.end_of_turn]
                assert given.read(index).tokens == right
