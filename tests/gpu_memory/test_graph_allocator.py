"""The layout of tensors in a compute buffer, on graphs small enough to be laid out by hand."""

from mode_gguf.gpu_memory.graph_allocator import ALIGNMENT, Graph

ONE = (ALIGNMENT // 4,)
"""A tensor of one unit."""
TWO = (ALIGNMENT // 2,)


def units(graph: Graph) -> float:
    return graph.buffer_bytes() / ALIGNMENT


def test_a_chain_needs_two_at_a_time() -> None:
    graph = Graph()
    node = graph.input(*ONE)
    for _ in range(5):
        node = graph.add(ONE, node)
    assert units(graph) == 2


def test_what_is_written_in_place_needs_one() -> None:
    graph = Graph()
    node = graph.input(*ONE)
    for _ in range(5):
        node = graph.add(ONE, node, in_place=True)
    assert units(graph) == 1


def test_nothing_is_written_over_what_is_read_later_or_kept_or_seen_through_a_view() -> None:
    for spoil in ("read", "kept", "view", "other shape"):
        graph = Graph()
        node = graph.add(ONE, graph.input(*ONE), kept=spoil == "kept")
        before = graph.view(node, *ONE) if spoil == "view" else node
        after = graph.add((1, *ONE) if spoil == "other shape" else ONE, before, in_place=True)
        graph.add(ONE, after, node) if spoil == "read" else graph.add(ONE, after)
        assert units(graph) == (3 if spoil in ("read", "kept") else 2), spoil


def test_a_view_keeps_its_tensor() -> None:
    graph = Graph()
    node = graph.add(ONE, graph.input(*ONE))
    part = graph.view(graph.view(node, 4), 2)
    other = graph.add(ONE, graph.add(TWO))
    graph.add(ONE, part, other)
    assert units(graph) == 4


def test_what_is_written_into_stays() -> None:
    graph = Graph()
    target = graph.add(TWO)
    graph.write(target, graph.input(*ONE))
    graph.add(TWO, graph.add(TWO))
    assert units(graph) == 1 + 2 + 2 + 2


def test_the_smallest_block_that_fits_is_taken() -> None:
    graph = Graph()
    large, between, small, last = (graph.add(shape) for shape in (TWO, ONE, ONE, ONE))
    graph.add((0,), large, small)  # frees the blocks at 0 and at 3
    into_small, into_large = graph.add(ONE), graph.add(TWO)
    graph.add((0,), between, last, into_small, into_large)
    assert units(graph) == 5
    assert (into_small.size, into_large.size) == (ALIGNMENT, 2 * ALIGNMENT)


def test_sizes_are_padded_and_operations_may_want_more() -> None:
    graph = Graph()
    graph.add((1,), graph.input(3, bytes_per_value=2), extra=ALIGNMENT)
    assert units(graph) == 1 + 2
