"""Buffer size of a compute graph in ggml: its tensors laid out one after the other as ggml's graph allocator does.

That allocator walks the graph once before anything is computed. A tensor takes the smallest free block that holds it,
or grows the buffer; its block is free again when the last operation that reads it is done; an operation that can write
over what it reads takes its place. The buffer's size is the highest end that was reached. Only sizes count, so a graph
here is a list of operations with sizes: no weights, which lie in buffers of their own.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Final

ALIGNMENT: Final = 128
"""Bytes: CUDA's. The CPU's is 64, which makes a difference of bytes per tensor."""


@dataclass(eq=False, slots=True)
class Node:
    """A tensor: what an operation writes, an input, or a view of another one.

    Attributes:
        shape: ne, the fastest dimension first.
        bytes_per_value: 4 of F32, 2 of F16.
        sources: operands, weights left out.
        in_place: whether the operation may write over a source of the same shape.
        view_of: the tensor whose memory this one is.
        extra: bytes beside the values, for the operation's own use.
    """

    shape: tuple[int, ...]
    bytes_per_value: int = 4
    sources: tuple["Node", ...] = ()
    in_place: bool = False
    view_of: "Node | None" = None
    extra: int = 0
    kept: bool = False
    readers: int = 0
    views: int = 0
    offset: int | None = None

    @property
    def size(self) -> int:
        """Bytes in the buffer."""
        return _aligned(self.bytes_per_value * prod(self.shape) + self.extra)


@dataclass(slots=True)
class Graph:
    """A compute graph: operations in the order in which they run."""

    inputs: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def input(self, *shape: int, bytes_per_value: int = 4) -> Node:
        """An input, written from outside before the graph runs."""
        node = Node(shape, bytes_per_value)
        self.inputs.append(node)
        return node

    def add(
        self,
        shape: Sequence[int],
        *sources: Node,
        in_place: bool = False,
        bytes_per_value: int = 4,
        extra: int = 0,
        kept: bool = False,
    ) -> Node:
        """An operation; a `kept` result is read after the graph has run."""
        node = Node(tuple(shape), bytes_per_value, sources, in_place, extra=extra, kept=kept)
        self.nodes.append(node)
        return node

    def view(self, source: Node, *shape: int) -> Node:
        """The same memory in another shape."""
        node = Node(shape, source.bytes_per_value, (source,), view_of=source.view_of or source)
        self.nodes.append(node)
        return node

    def write(self, target: Node, *sources: Node) -> Node:
        """Write into a part of `target`."""
        node = Node(target.shape, target.bytes_per_value, (*sources, target), view_of=target.view_of or target)
        self.nodes.append(node)
        return node

    def store(self, source: Node, *indices: Node) -> Node:
        """Write `source` into memory that is not the graph's, such as the KV cache."""
        return self.add((0,), source, *indices)

    def buffer_bytes(self) -> int:
        """Size of the buffer that the graph is computed in."""
        buffer = _Buffer()
        for node in self.inputs:
            node.offset = buffer.allocate(node.size)
        for node in self.nodes:
            if node.view_of:
                node.view_of.views += 1
            for source in node.sources:
                source.readers += 1
        for node in self.nodes:
            _place(node, buffer)
            for source in node.sources:
                source.readers -= 1
                if source.readers == source.views == 0:
                    root = source.view_of
                    if root:
                        root.views -= 1
                    _release(root or source, buffer)
        return buffer.size


def _place(node: Node, buffer: "_Buffer") -> None:
    if node.view_of or not prod(node.shape):
        return
    for parent in node.sources if node.in_place else ():
        # Never over a view, even where nothing else reads what it shows.
        same = parent.shape == node.shape and parent.bytes_per_value == node.bytes_per_value
        if same and parent.offset is not None and parent.readers == 1 and parent.views == 0 and not parent.kept:
            node.offset, parent.offset = parent.offset, None
            return
    node.offset = buffer.allocate(node.size)


def _release(node: Node, buffer: "_Buffer") -> None:
    if node.offset is not None and node.readers == node.views == 0 and not node.kept:
        buffer.free(node.offset, node.size)
        node.offset = None


class _Buffer:
    """Free blocks, lowest first, as (offset, size); behind the last of them the buffer can grow."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []
        self._end = 0

    def allocate(self, size: int) -> int:
        """Offset of a block: of the smallest that is large enough, of several the last, else at the end."""
        fitting = [block for block in self._free if block[1] >= size]
        if not fitting:
            offset, self._end = self._end, self._end + size
            self.size = max(self.size, self._end)
            return offset
        block = min(fitting, key=lambda block: (block[1], -block[0]))
        self._free.remove(block)
        if block[1] > size:
            insort(self._free, (block[0] + size, block[1] - size))
        return block[0]

    def free(self, offset: int, size: int) -> None:
        """Free a block, which joins its free neighbours."""
        if not size:
            return
        before = next((block for block in self._free if sum(block) == offset), None)
        after = next((block for block in self._free if block[0] == offset + size), None)
        for block in filter(None, (before, after)):
            self._free.remove(block)
        start = before[0] if before else offset
        end = sum(after) if after else offset + size
        if end == self._end:
            self._end = start
        else:
            insort(self._free, (start, end - start))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
