"""Every family the whole way; those that take long, or for which there is more to check, have modules of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.cases import CASES
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.whole_way import convert_and_answer

TOGETHER = [case for case in CASES if case.conversion and not case.conversion.alone]


@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.name)
def test_convert_and_answer_about_a_picture(
    case: FamilyCase, families: Families, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    convert_and_answer(case, families.checkpoint(case.layouts[0]).path, tmp_path, run, caplog)
