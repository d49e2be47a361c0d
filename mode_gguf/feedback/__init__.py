"""Rounding with error feedback: what a matrix reads decides how the errors of its weights make up for each other."""
