"""The pico checkpoint as GGUF files, and samples to judge them on: fixtures of the validation tests."""

from tests.validation.conftest import folder, full, held_out_folder, picture, settings, small

__all__ = ["folder", "full", "held_out_folder", "picture", "settings", "small"]
