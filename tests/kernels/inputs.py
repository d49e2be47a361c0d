"""Weights and importances to pack, drawn to reach every corner of the searches; all finite."""

from collections.abc import Callable

import numpy as np

F = np.float32
Draw = Callable[[np.random.Generator, int, int], np.ndarray]
"""(generator, rows, columns) to a matrix; columns are a multiple of 256."""

_HIGHEST = 3.4e38
"""Just below the largest float32, as ggml's own arithmetic overflows long before it."""


def _normal(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return generator.standard_normal((rows, columns), F)


def _runs(generator: np.random.Generator, rows: int, columns: int, length: int, share: float) -> np.ndarray:
    """A mask that holds for whole runs of `length` weights."""
    mask: np.ndarray = (generator.random((rows, columns // length)) < share).repeat(length, axis=1)
    return mask


def _constant(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return generator.standard_normal((rows, columns // 256)).repeat(256, axis=1)


def _zeros(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Most blocks nothing but zeros, of one sign, of the other, or of both; some with one tiny weight."""
    signs = generator.integers(-1, 2, (rows, columns // 256)).repeat(256, axis=1)
    mixed = generator.integers(0, 2, (rows, columns)) * 2.0 - 1.0
    zeros = np.copysign(0.0, np.where(signs == 0, mixed, signs))
    return np.where(generator.random((rows, columns)) < 0.001, 1e-15 * mixed, zeros)


def _two_valued(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    first, second = generator.standard_normal((2, rows, columns // 32)).repeat(32, axis=2)
    values: np.ndarray = np.where(generator.random((rows, columns)) < 0.5, first, second)
    return values


def _one_outlier(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Weights of which one in every block is larger by two to eight orders of magnitude."""
    matrix = _normal(generator, rows, columns).astype(np.float64).reshape(-1, 256)
    where = generator.integers(0, 256, len(matrix))
    matrix[np.arange(len(matrix)), where] *= 10.0 ** generator.uniform(2, 8, len(matrix))
    return matrix.reshape(rows, columns)


def _ramps(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    slope, start = generator.standard_normal((2, rows, columns // 64)).repeat(64, axis=2)
    ramps: np.ndarray = start + slope * (np.arange(columns) % 64) / 64
    return ramps


def _exponents(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Weights in runs of 16 with an exponent of their own, from subnormal to huge."""
    exponents = generator.uniform(-44, 38, (rows, columns // 16)).repeat(16, axis=1)
    return _normal(generator, rows, columns) * 10.0**exponents


def _any_bits(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    drawn = generator.integers(0, 1 << 32, (rows, columns), np.uint32).view(F)
    return np.where(np.isfinite(drawn), drawn, F(1))


def _bfloat16(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (_normal(generator, rows, columns).view(np.uint32) & 0xFFFF0000).view(F)


DISTRIBUTIONS: dict[str, Draw] = {
    "gaussian": lambda g, r, c: _normal(g, r, c) * F(0.02),
    "laplace": lambda g, r, c: g.laplace(scale=0.02, size=(r, c)),
    "student-t2": lambda g, r, c: g.standard_t(2, (r, c)) * 0.02,
    "cauchy": lambda g, r, c: g.standard_cauchy((r, c)),
    "sparse": lambda g, r, c: _normal(g, r, c) * (g.random((r, c)) > 0.95),
    "zeros": _zeros,
    "empty-blocks": lambda g, r, c: _normal(g, r, c) * _runs(g, r, c, 256, 0.5),
    "empty-sub-blocks": lambda g, r, c: _normal(g, r, c) * _runs(g, r, c, 16, 0.5),
    "constant": _constant,
    "two-valued": _two_valued,
    "ramps": _ramps,
    "positive": lambda g, r, c: np.abs(_normal(g, r, c)),
    "negative": lambda g, r, c: -np.abs(_normal(g, r, c)) - 3 * _runs(g, r, c, 16, 0.5),
    "far-from-zero": lambda g, r, c: _normal(g, r, c) * F(1e-6) - F(1),
    "one-bit-apart": lambda g, r, c: F(-1) - F(1.2e-7) * g.integers(0, 2, (r, c)),
    "ties": lambda g, r, c: g.integers(-3, 4, (r, c)) * 0.5,
    "one-outlier": _one_outlier,
    "few-outliers": lambda g, r, c: _normal(g, r, c) * np.where(g.random((r, c)) > 0.999, F(1000), F(1)),
    "denormal": lambda g, r, c: _normal(g, r, c) * F(1e-41),
    "tiny": lambda g, r, c: _normal(g, r, c) * F(1e-30),
    "half-range": lambda g, r, c: _normal(g, r, c) * F(3e4),
    "huge": lambda g, r, c: _normal(g, r, c) * np.float64(8.5e37),
    "all-exponents": _exponents,
    "any-bits": _any_bits,
    "bfloat16": _bfloat16,
    "float16": lambda g, r, c: _normal(g, r, c).astype(np.float16),
    "student-t4": lambda g, r, c: g.standard_t(4, (r, c)) * 0.02,
}

IMPORTANCES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "squares": lambda g, n: g.standard_normal(n) ** 2 + 1e-3,
    "log-normal": lambda g, n: np.exp(3 * g.standard_normal(n)),
    "zeros in places": lambda g, n: g.standard_normal(n) ** 2 * (g.random(n) > 0.2) * _runs(g, 1, n, 16, 0.9)[0],
    "mostly zeros": lambda g, n: g.standard_normal(n) ** 2 * (g.random(n) > 0.9),
    "zero blocks": lambda g, n: g.standard_normal(n) ** 2 * _runs(g, 1, n, 256, 0.5)[0],
    "all exponents": lambda g, n: 10.0 ** g.uniform(-38, 38, n),
    "equal": lambda g, n: np.full(n, g.exponential()),
    "tiny": lambda g, n: g.standard_normal(n) ** 2 * 1e-40,
}


def weights(name: str, generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A float32 matrix of the distribution `name`."""
    drawn = DISTRIBUTIONS[name](generator, rows, columns).astype(np.float64)
    return np.clip(drawn, -_HIGHEST, _HIGHEST).astype(F)


def importance(name: str, generator: np.random.Generator, columns: int) -> np.ndarray:
    """A float32 importance per column of the kind `name`."""
    return IMPORTANCES[name](generator, columns).astype(F)
