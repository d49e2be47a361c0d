"""The samples of the calibration tests."""

from tests.calibration.conftest import samples

__all__ = ["samples"]
