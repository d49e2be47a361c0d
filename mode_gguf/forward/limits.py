"""Default limits of calibration, free of torch."""

MAX_TOKENS = 512
"""Text tokens of a sample; longer texts and answers are cut."""

MAX_IMAGE_PIXELS = 512 * 512
"""Area in pixels that images are scaled down to."""

LABEL_DRAWS = 3
"""Labels drawn per scored position by Fisher sensitivity."""
