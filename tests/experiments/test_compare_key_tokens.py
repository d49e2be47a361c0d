"""The share of the image answers' cost that key tokens carry."""

import numpy as np

from compare_key_tokens import key_share


def test_key_share_is_of_what_goes_through_vision() -> None:
    text_answers = [9.0, 0.0, 0.0]
    costs = np.array([[text_answers, [5.0, 1.0, 3.0]], [text_answers, [5.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(key_share(costs), [0.25, np.nan])
    np.testing.assert_allclose(key_share(costs.sum(axis=0)), 0.25)
