"""Limits that calibration keeps to by default, for whoever must know them without torch."""

MAX_TOKENS = 512
"""Text tokens of a sample; longer texts and answers are cut."""

MAX_IMAGE_PIXELS = 512 * 512
"""Area that images are scaled down to."""

LABEL_DRAWS = 3
"""Labels drawn per scored position by Fisher sensitivity."""
