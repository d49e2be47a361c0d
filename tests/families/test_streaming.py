"""The streamed model of every family, in every layout, computes what transformers' whole model does."""

from mode_gguf.forward.streaming import open_streamed
from tests.families.cases import every_layout
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.forward.test_streaming import assert_streamed_is_plain


@every_layout
def test_streamed_forward_equals_the_plain_one(case: FamilyCase, layout: str, families: Families) -> None:
    streamed = open_streamed(families.checkpoint(layout), "cpu")
    assert_streamed_is_plain(streamed, families.inputs(layout), families.model(case), atol=case.streamed_atol)
    assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())
