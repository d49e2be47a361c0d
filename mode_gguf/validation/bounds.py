"""Limits that a file must keep, so that a command can gate a pipeline."""

from dataclasses import asdict
from typing import Final

from mode_gguf.errors import InputError, UsageError, ValidationError
from mode_gguf.options import Limits
from mode_gguf.validation.questions import HeldOutSet
from mode_gguf.validation.report import Check, Divergence, ValidationReport

ALL_KINDS: Final = "all"
"""The kind under which a report counts all questions together."""
_FIELDS: Final = {
    "max_kl": "kl_at_most",
    "max_kl_p99": "kl_p99_at_most",
    "max_kl_p99_9": "kl_p99_9_at_most",
    "min_top1": "top1_agreement",
}
"""Fields of `Divergence` that are compared with a limit."""


def given_limits(limits: Limits) -> dict[str, float]:
    """The limits that ask something, by name."""
    return {name: limit for name, limit in asdict(limits).items() if limit is not None}


def limit_option(name: str) -> str:
    """`max_kl_p99_9` as it is typed: `--max-kl-p99-9`."""
    return "--" + name.replace("_", "-")


def check_measurable(limits: Limits, held_out: HeldOutSet, *, with_reference: bool, with_images: bool) -> None:
    """Make sure that every limit can be checked, before hours are spent.

    Raises:
        UsageError: a limit needs a reference or a projector, and there is none.
        InputError: it needs texts, questions or right answers, and the held-out set has none.
    """
    for name in given_limits(limits):
        if name != "min_accuracy" and not with_reference:
            raise UsageError(f"{limit_option(name)}: needs a --reference to compare with")
        asks_images = "image" in name or name == "min_accuracy"
        if asks_images and not with_images:
            raise UsageError(f"{limit_option(name)}: needs the projector, --mmproj")
        if asks_images and not held_out.questions:
            raise InputError(f"{limit_option(name)}: the held-out set {held_out.name} has no questions about pictures")
        if not asks_images and not held_out.texts:
            raise InputError(f"{limit_option(name)}: the held-out set {held_out.name} has no texts")
        if name == "min_accuracy" and all(question.answer is None for question in held_out.questions):
            raise InputError(
                f"{limit_option(name)}: no question of the held-out set {held_out.name} has a right answer"
            )


def checks_of(limits: Limits, report: ValidationReport) -> tuple[Check, ...]:
    """Every given limit beside what was found."""
    return tuple(_check(name, limit, _measured(name, report)) for name, limit in given_limits(limits).items())


def require_kept(report: ValidationReport) -> None:
    """Stop where a limit was broken.

    Raises:
        ValidationError: all broken limits, in one line.
    """
    broken = [f"{check.option} {check.limit:g}: {check.found:.6g} found" for check in report.checks if not check.kept]
    if broken:
        raise ValidationError(f"{report.candidate.name} breaks {'; '.join(broken)}")


def _check(name: str, limit: float, found: float) -> Check:
    kept = found <= limit if name.startswith("max") else found >= limit
    return Check(option=limit_option(name), limit=limit, found=found, kept=kept)


def _measured(name: str, report: ValidationReport) -> float:
    if name == "min_accuracy":
        return report.accuracy[ALL_KINDS].share
    part: Divergence | None = report.image if "image" in name else report.text
    value = getattr(part, _FIELDS[name.replace("image_", "")])
    assert isinstance(value, float)
    return value
