"""Sums over matrices of which some were not measured in some types, because their rows fit none."""

from collections.abc import Sequence

import numpy as np


def known_sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of what is known of arrays of one shape; NaN where nothing is."""
    stacked = np.array(arrays)
    return np.where(np.isnan(stacked).all(axis=0), np.nan, np.nansum(stacked, axis=0))
