"""Limits, what they are about, and the one line about those that are broken."""

from pathlib import Path

import pytest

from mode_gguf.errors import InputError, UsageError, ValidationError
from mode_gguf.options import Limits
from mode_gguf.validation.bounds import check_measurable, require_kept
from mode_gguf.validation.questions import HeldOutSet, Question
from mode_gguf.validation.reference import RunSettings
from mode_gguf.validation.validate import ComparedModels, validate
from tests.validation.conftest import Files


def question(answer: str | None) -> Question:
    return Question(Path("a.png"), "What?", answer, "exact", "question", "a:1")


SET = HeldOutSet("set", ("text",), (question("yes"),))


@pytest.mark.parametrize(
    ("limits", "held_out", "with_reference", "with_images", "error", "message"),
    [
        (Limits(max_kl=1), SET, False, True, UsageError, "--max-kl: needs a --reference"),
        (Limits(max_image_kl_p99_9=1), SET, True, False, UsageError, "--max-image-kl-p99-9: needs the projector"),
        (Limits(min_accuracy=1), SET, False, False, UsageError, "--min-accuracy: needs the projector"),
        (Limits(min_image_top1=1), HeldOutSet("s", ("a",), ()), True, True, InputError, "s has no questions"),
        (Limits(min_top1=1), HeldOutSet("s", (), SET.questions), True, True, InputError, "s has no texts"),
        (
            Limits(min_accuracy=1),
            HeldOutSet("s", (), (question(None),)),
            True,
            True,
            InputError,
            "no question .* right",
        ),
    ],
)
def test_what_is_not_measured(
    limits: Limits, held_out: HeldOutSet, with_reference: bool, with_images: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_measurable(limits, held_out, with_reference=with_reference, with_images=with_images)


def test_accuracy_needs_no_reference() -> None:
    check_measurable(Limits(min_accuracy=0.5), SET, with_reference=False, with_images=True)


def test_verdicts(full: Files, small: Files, held_out: HeldOutSet, settings: RunSettings) -> None:
    limits = Limits(
        max_kl=1e-9,
        max_kl_p99=1e3,
        max_kl_p99_9=1e3,
        min_top1=1.0,
        max_image_kl=1e3,
        max_image_kl_p99=1e-9,
        max_image_kl_p99_9=1e-9,
        min_image_top1=0.0,
        min_accuracy=0.0,
    )
    report = validate(ComparedModels(small.text, full.text, full.mmproj), held_out, settings=settings, limits=limits)
    verdicts = {check.option: check.kept for check in report.checks}
    assert verdicts.pop("--min-top1") in (True, False)
    assert verdicts == {
        "--max-kl": False,
        "--max-kl-p99": True,
        "--max-kl-p99-9": True,
        "--max-image-kl": True,
        "--max-image-kl-p99": False,
        "--max-image-kl-p99-9": False,
        "--min-image-top1": True,
        "--min-accuracy": True,
    }
    assert report.text is not None
    assert report.image is not None
    found = {check.option: check.found for check in report.checks}
    assert found["--max-kl"] == report.text.kl_mean == report.text.kl_at_most
    assert found["--max-image-kl-p99"] == report.image.kl_p99
    with pytest.raises(ValidationError, match=r"^pico-Q2_K\.gguf breaks --max-kl 1e-09: .*; .*--max-image-kl-p99"):
        require_kept(report)
    kept = report.model_copy(update={"checks": tuple(check for check in report.checks if check.kept)})
    require_kept(kept)
