"""The graphs that llama.cpp computes for Qwen3-VL-MoE: its text model, and its image encoder.

Operation by operation as in llama.cpp's `qwen3vlmoe` and mtmd's `qwen3vl`, with flash attention. H is the hidden size, T
the tokens of a batch, P the patches of a picture.
"""

from dataclasses import dataclass
from typing import Final

from mode_gguf.memory.graph import Graph, Node

F16: Final = 2
I64: Final = 8


@dataclass(frozen=True, slots=True)
class TextShape:
    """Of the text model; `deepstack` counts the image encoder's extra outputs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_used: int
    expert_width: int
    vocabulary: int
    deepstack: int


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Of the image encoder and the mergers behind it."""

    hidden: int
    width: int
    blocks: int
    heads: int
    patch: int
    merge: int
    output: int
    positions: int
    taps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What the text graph is reserved for.

    Attributes:
        tokens: that are computed at once (`n_ubatch`).
        cells: of the KV cache, of all streams together.
        streams: parallel sequences, unless they share one cache.
        outputs: tokens whose logits are wanted.
        rotated: whether K and V are rotated before they are stored, as llama.cpp does with a quantized cache.
        copied: whether the GPU's flash attention unpacks K and V of a layer, beside its result.
        groups: of experts with a type of their own.
    """

    tokens: int
    cells: int
    streams: int
    outputs: int
    rotated: bool
    copied: bool
    groups: int = 1


def text_graph(shape: TextShape, batch: Batch) -> Graph:
    """All layers over one batch."""
    graph = Graph()
    hidden, tokens = shape.hidden, batch.tokens
    stacked, embedded = _embeddings(graph, shape, tokens)
    positions = graph.input(4 * tokens)
    k_cells, v_cells = graph.input(tokens, bytes_per_value=I64), graph.input(tokens, bytes_per_value=I64)
    mask = graph.input(batch.cells // batch.streams, tokens, bytes_per_value=F16)
    attention = _Attention(shape, batch, positions, k_cells, v_cells, mask, *_rotations(graph, shape, batch))
    wanted = graph.input(batch.outputs)
    current = embedded
    for layer in range(shape.layers):
        residual = current
        current = attention.add(graph, _norm(graph, current))
        if layer == shape.layers - 1:
            current = graph.add((hidden, batch.outputs), current, wanted)
            residual = graph.add((hidden, batch.outputs), residual, wanted)
        residual = graph.add(current.shape, current, residual, in_place=True)
        mixed = _experts(graph, shape, _norm(graph, residual), batch.groups)
        current = graph.add(mixed.shape, mixed, residual, in_place=True)
        if layer < shape.deepstack:
            features = graph.view(stacked, hidden, tokens)
            current = graph.add(current.shape, current, features, in_place=True)
    graph.add((shape.vocabulary, batch.outputs), _norm(graph, current), kept=True)
    return graph


def _embeddings(graph: Graph, shape: TextShape, tokens: int) -> tuple[Node, Node]:
    """What enters, with room for DeepStack features: of tokens, of pictures, and mixed; the graph holds all three.

    The first is what the layers read.
    """
    width = (1 + shape.deepstack) * shape.hidden
    ids, mixed_ids = graph.input(tokens), graph.input(tokens)
    graph.input(width, tokens)
    slots, mixed = graph.input(tokens, bytes_per_value=I64), graph.input(width, tokens)
    chosen, rows = (graph.add((shape.hidden, tokens), source) for source in (ids, mixed_ids))
    if shape.deepstack:
        chosen, rows = (graph.add((width, tokens), source) for source in (chosen, rows))
    graph.write(graph.add((width, tokens), mixed), rows, slots)
    return chosen, graph.view(chosen, shape.hidden, tokens)


def _rotations(graph: Graph, shape: TextShape, batch: Batch) -> tuple[Node | None, Node | None]:
    """Matrices that K (and Q), and V are rotated with: of the largest power of two that divides a head, and of 64."""
    if not batch.rotated or shape.head_dim % 64:
        return None, None
    side = shape.head_dim & -shape.head_dim
    return graph.input(side, side), graph.input(64, 64)


@dataclass(frozen=True, slots=True)
class _Attention:
    shape: TextShape
    batch: Batch
    positions: Node
    k_cells: Node
    v_cells: Node
    mask: Node
    k_rotation: Node | None
    v_rotation: Node | None

    def add(self, graph: Graph, normed: Node) -> Node:
        shape, tokens = self.shape, self.batch.tokens
        query = _rotated(graph, self._head_vectors(graph, normed, shape.heads), self.k_rotation)
        value = graph.add((shape.kv_heads * shape.head_dim, tokens), normed)
        value = graph.view(value, shape.head_dim, shape.kv_heads, tokens)
        value = _rotated(graph, value, self.v_rotation)
        key = _rotated(graph, self._head_vectors(graph, normed, shape.kv_heads), self.k_rotation)
        for stored, cells in ((key, self.k_cells), (value, self.v_cells)):
            graph.store(graph.view(stored, shape.kv_heads * shape.head_dim, tokens), cells)
        query = graph.view(query, shape.head_dim, tokens, shape.heads)
        copies = 2 * F16 * self.batch.cells * shape.kv_heads * shape.head_dim if self.batch.copied else 0
        result = graph.add((shape.head_dim, shape.heads, tokens), query, self.mask, extra=copies)
        result = _rotated(graph, graph.view(result, shape.heads * shape.head_dim, tokens), self.v_rotation)
        return graph.add((shape.hidden, tokens), result)

    def _head_vectors(self, graph: Graph, normed: Node, heads: int) -> Node:
        """Queries or keys: projected, normed head by head, given their positions."""
        shape = (self.shape.head_dim, heads, self.batch.tokens)
        projected = graph.add((self.shape.head_dim * heads, self.batch.tokens), normed)
        vectors = _norm(graph, graph.view(projected, *shape))
        return graph.add(shape, vectors, self.positions, in_place=True)


def _rotated(graph: Graph, vectors: Node, rotation: Node | None) -> Node:
    if rotation is None:
        return vectors
    side = rotation.shape[0]
    values = 1
    for length in vectors.shape:
        values *= length
    rows = graph.view(vectors, side, values // side)
    return graph.view(graph.add(rows.shape, rotation, rows), *vectors.shape)


def _norm(graph: Graph, current: Node, *, bias: bool = False, in_place: bool = True) -> Node:
    """A norm, times its weights, and its bias; RMS norm may write over what it reads, the other one may not."""
    normed = graph.add(current.shape, current, in_place=in_place)
    scaled = graph.add(current.shape, normed, in_place=True)
    return graph.add(current.shape, scaled, in_place=True) if bias else scaled


def _experts(graph: Graph, shape: TextShape, normed: Node, groups: int) -> Node:
    """The MoE block: routing, gate and up of all chosen experts, down, and their weighted sum."""
    hidden, tokens = normed.shape
    used, width = shape.experts_used, shape.expert_width
    logits = graph.add((shape.experts, tokens), normed)
    probabilities = graph.add(logits.shape, logits, in_place=True)
    order = graph.add(logits.shape, probabilities)
    chosen = graph.view(order, used, tokens)
    weights = graph.add((1, used, tokens), graph.view(probabilities, 1, shape.experts, tokens), chosen)
    weights = graph.view(weights, used, tokens)
    total = graph.add((1, tokens), weights)
    total = graph.add((1, tokens), total, in_place=True)
    weights = graph.add((used, tokens), weights, total, in_place=True)
    weights = graph.view(weights, 1, used, tokens)
    entering = graph.view(normed, hidden, 1, tokens)
    gate = _of_groups(graph, (width, used, tokens), entering, chosen, groups)
    up = _of_groups(graph, (width, used, tokens), entering, chosen, groups)
    activated = graph.add(gate.shape, gate, up)
    down = _of_groups(graph, (hidden, used, tokens), activated, chosen, groups)
    weighted = graph.add(down.shape, down, weights, in_place=True)
    parts = [graph.view(weighted, hidden, tokens) for _ in range(used)]
    mixed = parts[0]
    for part in parts[1:]:
        mixed = graph.add((hidden, tokens), mixed, part, in_place=True)
    return mixed if used > 1 else graph.add((hidden, tokens), mixed)


def _of_groups(graph: Graph, shape: tuple[int, ...], entering: Node, chosen: Node, groups: int) -> Node:
    return graph.add(shape, entering, chosen)
