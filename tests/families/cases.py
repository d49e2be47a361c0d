"""The table of model families that the conformance tests of this folder go through.

Adding a family takes a case here: how its pico checkpoint is written, what transformers and llama.cpp are to make of
it, how near they come, and what is refused. What only one family has is tested in a file of that family.
"""

import pytest

from tests.families.case.gemma4 import GEMMA4
from tests.families.case.glm4v import GLM4V
from tests.families.case.internvl import INTERNVL
from tests.families.case.kimi import KIMI_K25, KIMI_VL
from tests.families.case.mistral4 import MISTRAL4
from tests.families.case.qwen3_5 import QWEN3_5
from tests.families.case.qwen3_vl import QWEN3_VL

CASES = (QWEN3_VL, QWEN3_5, GEMMA4, GLM4V, INTERNVL, KIMI_VL, KIMI_K25, MISTRAL4)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_layout = pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, id=f"{case.name}-{layout.removeprefix('pico_')}")
        for case in CASES
        for layout in case.layouts
    ],
)


def each_of(attribute: str, argument: str) -> pytest.MarkDecorator:
    """A test of everything that families have of a kind."""
    params = [
        pytest.param(case, one, id=f"{case.name}-{one.name}") for case in CASES for one in getattr(case, attribute)
    ]
    return pytest.mark.parametrize(("case", argument), params)


def cases_with(attribute: str) -> pytest.MarkDecorator:
    """A test of the families that have something."""
    having = [case for case in CASES if getattr(case, attribute)]
    return pytest.mark.parametrize("case", having, ids=lambda case: case.name)
