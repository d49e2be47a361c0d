"""Rounding with error feedback: errors of a matrix's weights compensate each other by its inputs' second moments."""
