"""The stages of a conversion, a class each."""
