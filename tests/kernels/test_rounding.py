"""Rounding with error feedback: the levels' places in a block, the kernel against its formula, and less error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf_kernels import FEEDBACK_TYPES, TYPES, Feedback, PackingError, Refinement, pack, round_again, unpack
from mode_gguf_kernels.gptq import polish, round_with_feedback
from mode_gguf_kernels.levels import Grid, Layout, grid_of, read_levels, write_levels

ROWS, COLUMNS = 24, 512


def layout_of(type_name: str) -> Layout:
    layout = TYPES[type_name].layout
    assert layout is not None
    return layout


def blocks_of(packed: np.ndarray, type_name: str) -> np.ndarray:
    return packed.reshape(len(packed), -1, TYPES[type_name].block_bytes)


def weights_of(blocks: np.ndarray, type_name: str) -> np.ndarray:
    rows = np.ascontiguousarray(blocks).reshape(len(blocks), -1)
    return unpack(rows, type_name, blocks.shape[1] * TYPES[type_name].block_size)


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (ROWS, COLUMNS)).astype(np.float32) * np.float32(0.02)


@pytest.fixture(scope="module")
def moments() -> np.ndarray:
    """Second moments of inputs that are strongly correlated, as real ones are: rank 40 and a little of everything."""
    generator = np.random.default_rng(5)
    inputs = generator.standard_normal((2000, 40)) @ generator.standard_normal((40, COLUMNS))
    inputs += 0.3 * generator.standard_normal((2000, COLUMNS))
    result: np.ndarray = inputs.T @ inputs / len(inputs)
    return result


def feedback_of(moments: np.ndarray) -> Feedback:
    """U of H = U D U', by definition of the Cholesky factor of the reversed matrix."""
    upper = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    return Feedback(moments.astype(np.float32), (upper / np.diag(upper)).astype(np.float32))


def output_error(matrix: np.ndarray, packed: np.ndarray, type_name: str, moments: np.ndarray) -> float:
    change = unpack(packed, type_name, matrix.shape[1]).astype(np.float64) - matrix
    return float(np.einsum("ri,ij,rj->", change, moments, change))


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_levels_lie_where_the_table_says(type_name: str, seed: int) -> None:
    """Any bytes at all: levels and grid together are the unpacked weights, and levels written are levels read."""
    layout = layout_of(type_name)
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((3, COLUMNS)).astype(np.float32)
    blocks = blocks_of(pack(matrix, type_name), type_name)
    for field in layout.fields:
        place = blocks[..., field.place]
        place[...] = generator.integers(0, 256, place.shape, np.uint8)
    grid = grid_of(blocks, layout, lambda filled: weights_of(filled, type_name))
    levels = read_levels(blocks, layout)
    assert levels.max() <= layout.highest
    expected = grid.lowest.repeat(grid.width, 1) + grid.step.repeat(grid.width, 1) * grid.values[levels]
    np.testing.assert_allclose(weights_of(blocks, type_name), expected, rtol=1e-5, atol=1e-6)

    new = generator.integers(0, layout.highest + 1, levels.shape).astype(np.uint8)
    written = blocks.copy()
    write_levels(new, layout, written)
    np.testing.assert_array_equal(read_levels(written, layout), new)
    write_levels(levels, layout, written)
    np.testing.assert_array_equal(written, blocks)


def grid_of_packed(packed: np.ndarray, type_name: str) -> Grid:
    grid = grid_of(blocks_of(packed, type_name), layout_of(type_name), lambda filled: weights_of(filled, type_name))
    return grid._replace(lowest=np.ascontiguousarray(grid.lowest), step=np.ascontiguousarray(grid.step))


def by_definition(grid: Grid, matrix: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Levels chosen column by column in float64."""
    lowest, step = (part.repeat(grid.width, 1).astype(np.float64) for part in (grid.lowest, grid.step))
    errors, levels = np.zeros(matrix.shape), np.zeros(matrix.shape, np.uint8)
    for j in range(matrix.shape[1]):
        target = matrix[:, j] + errors[:, :j] @ factor[:j, j].astype(np.float64)
        usable = step[:, j] != 0
        ratio = (target - lowest[:, j]) / np.where(usable, step[:, j], 1)
        level = np.where(usable, np.abs(ratio[:, None] - grid.values).argmin(axis=1), 0)
        levels[:, j] = level
        errors[:, j] = matrix[:, j] - (lowest[:, j] + step[:, j] * grid.values[level])
    return levels


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
def test_every_column_takes_the_errors_of_those_before_it(type_name: str, moments: np.ndarray) -> None:
    """Float32 may decide a tie otherwise, and what follows in that row with it: rows are compared up to there."""
    matrix, factor = drawn(3), feedback_of(moments).factor
    grid = grid_of_packed(pack(matrix, type_name, refinement=Refinement()), type_name)
    found = np.empty(matrix.shape, np.uint8)
    round_with_feedback(matrix, grid, factor, found)
    expected = by_definition(grid, matrix, factor)
    differs = found != expected
    first_difference = np.where(differs.any(axis=1), differs.argmax(axis=1), COLUMNS)
    assert first_difference.mean() > 0.7 * COLUMNS
    same = np.arange(COLUMNS) < first_difference[:, None]
    np.testing.assert_array_equal(found[same], expected[same])


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
@pytest.mark.parametrize("sweeps", [1, 100])
def test_polish_ends_where_no_single_level_is_better(type_name: str, sweeps: int, moments: np.ndarray) -> None:
    """After many sweeps; after one, rows err less than before."""
    matrix = drawn(5)
    packed = pack(matrix, type_name, refinement=Refinement())
    grid = grid_of_packed(packed, type_name)
    levels = read_levels(blocks_of(packed, type_name), layout_of(type_name))
    lowest, step = (part.repeat(grid.width, 1).astype(np.float64) for part in (grid.lowest, grid.step))

    def errors() -> np.ndarray:
        found: np.ndarray = matrix - (lowest + step * grid.values[levels])
        return found

    def costs() -> np.ndarray:
        found: np.ndarray = np.einsum("ri,ij,rj->r", errors(), moments, errors())
        return found

    before = costs()
    h = feedback_of(moments).moments
    polish(matrix, grid, h, levels, sweeps)
    after = costs()
    assert (after < before).all()
    if sweeps > 1:
        gradients = errors() @ moments
        for move in (-1, 1):
            moved = levels.astype(int) + move
            inside = (moved >= 0) & (moved < len(grid.values))
            change = step * (grid.values[np.clip(moved, 0, len(grid.values) - 1)] - grid.values[levels])
            saved = 2 * change * gradients - change**2 * np.diag(moments)
            assert (saved[inside] < 1e-5 * after.mean()).all()


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
def test_outputs_err_far_less(type_name: str, moments: np.ndarray) -> None:
    matrix = drawn(4)
    importance = np.diag(moments).astype(np.float32)
    nearest = pack(matrix, type_name, importance, refinement=Refinement())
    packed = nearest.copy()
    round_again(packed, type_name, matrix, feedback_of(moments))
    before, after = (output_error(matrix, one, type_name, moments) for one in (nearest, packed))
    assert after < 0.7 * before


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
def test_scales_stay(type_name: str, moments: np.ndarray) -> None:
    matrix = drawn(6)
    nearest = pack(matrix, type_name)
    packed = nearest.copy()
    round_again(packed, type_name, matrix, feedback_of(moments))
    layout, stays = layout_of(type_name), np.ones(TYPES[type_name].block_bytes, bool)
    for field in layout.fields:
        stays[field.place] = False
    np.testing.assert_array_equal(blocks_of(packed, type_name)[..., stays], blocks_of(nearest, type_name)[..., stays])
    assert (packed != nearest).any()


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
def test_without_correlation_every_weight_is_rounded_to_nearest(type_name: str) -> None:
    """Of no weight is a level nearer than the one chosen, whatever packing had chosen."""
    matrix = drawn(7)
    packed = pack(matrix, type_name)
    identity = np.eye(COLUMNS, dtype=np.float32)
    round_again(packed, type_name, matrix, Feedback(identity, identity))
    layout, blocks = layout_of(type_name), blocks_of(packed, type_name)
    errors = np.abs(weights_of(blocks, type_name) - matrix)
    levels = read_levels(blocks, layout)
    for step in (-1, 1):
        others = blocks.copy()
        write_levels(np.clip(levels.astype(int) + step, 0, layout.highest).astype(np.uint8), layout, others)
        assert (errors <= np.abs(weights_of(others, type_name) - matrix) + 1e-7).all()


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
def test_rows_do_not_depend_on_each_other(type_name: str, moments: np.ndarray) -> None:
    matrix, feedback = drawn(8), feedback_of(moments)
    together = pack(matrix, type_name)
    apart = together.copy()
    round_again(together, type_name, matrix, feedback)
    for first in range(0, ROWS, 5):
        round_again(apart[first : first + 5], type_name, matrix[first : first + 5], feedback)
    np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("type_name", FEEDBACK_TYPES)
def test_blocks_of_zeros_stay_zeros(type_name: str, moments: np.ndarray) -> None:
    matrix = drawn(9)
    matrix[:, :256] = 0
    packed = pack(matrix, type_name)
    round_again(packed, type_name, matrix, feedback_of(moments))
    assert (unpack(packed, type_name, COLUMNS)[:, :256] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    matrix, identity = drawn(1), np.eye(COLUMNS, dtype=np.float32)
    feedback = Feedback(identity, identity)
    packed = pack(matrix, "Q2_K")
    with pytest.raises(PackingError, match=r"Q8_0 cannot be rounded with feedback: choose from Q2_K, Q3_K"):
        round_again(pack(matrix, "Q8_0"), "Q8_0", matrix, feedback)
    with pytest.raises(PackingError, match="do not go together"):
        round_again(packed[:3], "Q2_K", matrix, feedback)
    with pytest.raises(PackingError, match="do not go together"):
        round_again(packed, "Q2_K", matrix, Feedback(identity, identity[:256]))
