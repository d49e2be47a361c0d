"""The graphs that llama.cpp computes for Qwen3-VL-MoE: its text model, and its image encoder.

Operation by operation as in llama.cpp's `qwen3vlmoe` and mtmd's `qwen3vl`, with flash attention; written from what
build b11549 lists with GGML_SCHED_DEBUG=2. Shapes are ggml's, the fastest dimension first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from typing import Any, Final

from gguf import Keys

from mode_gguf.gpu_memory.graph_allocator import Graph, Node
from mode_gguf.gpu_memory.model_graphs import Batch, EncoderShape, ModelGraphs, TextShape

ARCHITECTURE: Final = "qwen3vlmoe"
IMAGE_TOKENS: Final = 4096
"""llama.cpp's default limit of an image's tokens."""
F16: Final = 2
I64: Final = 8


def text_shape(metadata: Mapping[str, Any], vocabulary: int) -> TextShape:
    """Sizes given by the text model's GGUF metadata."""

    def key(name: str) -> int:
        return int(metadata[name.format(arch=ARCHITECTURE)])

    return TextShape(
        hidden=key(Keys.LLM.EMBEDDING_LENGTH),
        layers=key(Keys.LLM.BLOCK_COUNT),
        heads=key(Keys.Attention.HEAD_COUNT),
        kv_heads=key(Keys.Attention.HEAD_COUNT_KV),
        head_dim=key(Keys.Attention.KEY_LENGTH),
        experts=key(Keys.LLM.EXPERT_COUNT),
        experts_used=key(Keys.LLM.EXPERT_USED_COUNT),
        expert_width=key(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH),
        vocabulary=vocabulary,
        deepstack=key(Keys.LLM.NUM_DEEPSTACK_LAYERS),
    )


def encoder_shape(metadata: Mapping[str, Any]) -> EncoderShape:
    """Sizes given by the projector's GGUF metadata."""
    keys = Keys.ClipVision
    patch = int(metadata[keys.PATCH_SIZE])
    taps = metadata[keys.IS_DEEPSTACK_LAYERS]
    return EncoderShape(
        hidden=int(metadata[keys.EMBEDDING_LENGTH]),
        width=int(metadata[keys.FEED_FORWARD_LENGTH]),
        blocks=int(metadata[keys.BLOCK_COUNT]),
        heads=int(metadata[keys.Attention.HEAD_COUNT]),
        patch=patch,
        merge=int(metadata[keys.SPATIAL_MERGE_SIZE]),
        output=int(metadata[keys.PROJECTION_DIM]),
        positions=(int(metadata[keys.IMAGE_SIZE]) // patch) ** 2,
        taps=tuple(block for block, tapped in enumerate(taps) if tapped),
    )


def text_graph(shape: TextShape, batch: Batch) -> Graph:
    """The graph of all layers over one batch."""
    graph = Graph()
    hidden, tokens = shape.hidden, batch.tokens
    stacked, embedded = _embeddings(graph, shape, tokens)
    positions = graph.input(4 * tokens)
    k_cells, v_cells = graph.input(tokens, bytes_per_value=I64), graph.input(tokens, bytes_per_value=I64)
    mask = graph.input(batch.cells // batch.streams, tokens, bytes_per_value=F16)
    attention = _Attention(shape, batch, positions, k_cells, v_cells, mask, *_rotations(graph, shape, batch))
    output_ids = graph.input(batch.outputs)
    current = embedded
    for layer in range(shape.layers):
        residual = current
        current = attention.add(graph, _norm(graph, current))
        if layer == shape.layers - 1:
            current = graph.add((hidden, batch.outputs), current, output_ids)
            residual = graph.add((hidden, batch.outputs), residual, output_ids)
        residual = graph.add(current.shape, current, residual, in_place=True)
        mixed = _experts(graph, shape, _norm(graph, residual), batch.groups)
        current = graph.add(mixed.shape, mixed, residual, in_place=True)
        if layer < shape.deepstack:
            features = graph.view(stacked, hidden, tokens)
            current = graph.add(current.shape, current, features, in_place=True)
    graph.add((shape.vocabulary, batch.outputs), _norm(graph, current), kept=True)
    return graph


def _embeddings(graph: Graph, shape: TextShape, tokens: int) -> tuple[Node, Node]:
    """Embeddings with space for DeepStack features: of tokens, of images, and mixed; the graph holds all three.

    The layers read the first.
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
    rows = graph.view(vectors, side, prod(vectors.shape) // side)
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
    inputs = graph.view(normed, hidden, 1, tokens)
    product = _grouped_product(graph, shape, chosen, groups) if groups > 1 else _chosen_product(graph, shape, chosen)
    gate, up = product(width, inputs), product(width, inputs)
    activated = graph.add(gate.shape, gate, up)
    down = product(hidden, activated)
    weighted = graph.add((hidden, used, tokens), down, weights, in_place=True)
    parts = [graph.view(weighted, hidden, tokens) for _ in range(used)]
    mixed = parts[0]
    for part in parts[1:]:
        mixed = graph.add((hidden, tokens), mixed, part, in_place=True)
    return mixed if used > 1 else graph.add((hidden, tokens), mixed)


def _chosen_product(graph: Graph, shape: TextShape, chosen: Node) -> Callable[[int, Node], Node]:
    """One product with the chosen experts' matrices."""

    def product(width: int, inputs: Node) -> Node:
        return graph.add((width, shape.experts_used, chosen.shape[1]), inputs, chosen)

    return product


def _grouped_product(graph: Graph, shape: TextShape, chosen: Node, groups: int) -> Callable[[int, Node], Node]:
    """Products with experts in groups, as the patched llama.cpp forms them on a GPU: rows that other groups serve are
    zeros, and the groups' results are added."""
    used, tokens = chosen.shape
    n_rows = used * tokens
    one = (1, n_rows)
    flat = graph.view(graph.add(chosen.shape, chosen), n_rows)
    table = graph.add((shape.experts, groups))
    own: list[tuple[Node, Node]] = []  # per group the places of the chosen experts, and a mask of its own rows
    for _ in range(groups):
        local = graph.add(one, graph.view(table, 1, shape.experts), flat)
        ids = graph.add(one, graph.add(one, local, in_place=True))
        mask = graph.add(one, graph.add(one, local, in_place=True), in_place=True)
        own.append((ids, graph.view(mask, 1, 1, n_rows)))

    def product(width: int, inputs: Node) -> Node:
        inner = inputs.shape[0]
        rows = graph.view(graph.add((inner, used, tokens), inputs), inner, 1, n_rows)
        parts = (
            graph.add((width, 1, n_rows), graph.add(rows.shape, rows, mask, in_place=True), ids) for ids, mask in own
        )
        result = reduce(lambda total, part: graph.add(part.shape, total, part, in_place=True), parts)
        return graph.view(result, width, used, tokens)

    return product


def encoder_graph(shape: EncoderShape, columns: int, rows: int) -> Graph:
    """The image encoder over one image of `columns` x `rows` patches."""
    graph = Graph()
    patches = columns * rows
    image = graph.input(columns * shape.patch, rows * shape.patch, 3)
    positions = graph.input(4 * patches)
    current = _patches(graph, shape, columns, rows, image)
    tapped = []
    for block in range(shape.blocks):
        current = _encoder_block(graph, shape, current, positions)
        if block in shape.taps:
            tapped.append(current)
    current = _merged(graph, shape, _norm(graph, current, bias=True, in_place=False), patches, normed=False)
    if tapped:
        features = (_merged(graph, shape, tap, patches, normed=True) for tap in tapped)
        _stacked(graph, current, reduce(partial(_stacked, graph), features))
    return graph


def _patches(graph: Graph, shape: EncoderShape, columns: int, rows: int, image: Node) -> Node:
    """Patches of both time steps, convolved and added, in the order in which they are merged, plus their positions."""
    hidden = shape.hidden
    steps = []
    for _ in range(2):
        unrolled = graph.add((3 * shape.patch**2, columns, rows), image, bytes_per_value=F16)
        convolved = graph.add((columns * rows, hidden), graph.view(unrolled, 3 * shape.patch**2, columns * rows))
        steps.append(graph.add((columns, rows, hidden), graph.view(convolved, columns, rows, hidden)))
    current = _reordered(graph, graph.add(steps[0].shape, *steps, in_place=True), hidden, columns, rows)
    current = graph.add(current.shape, current, in_place=True)
    if columns * rows == shape.positions and columns == rows:
        position_embeddings = graph.add((2 * hidden, columns // 2, rows))
    else:
        position_embeddings = graph.add((columns, rows, hidden))
        position_embeddings = graph.add(
            (hidden, columns * rows), graph.view(position_embeddings, hidden, columns, rows)
        )
        position_embeddings = graph.add((2 * hidden, columns // 2, rows), position_embeddings)
    position_embeddings = graph.add((hidden, columns * rows), graph.view(position_embeddings, hidden, columns * rows))
    return graph.add(current.shape, current, position_embeddings, in_place=True)


def _reordered(graph: Graph, current: Node, hidden: int, columns: int, rows: int) -> Node:
    current = graph.add((2 * hidden, columns // 2, rows), graph.view(current, hidden, columns, rows))
    return graph.add((hidden, columns * rows), graph.view(current, hidden, columns * rows))


def _encoder_block(graph: Graph, shape: EncoderShape, residual: Node, positions: Node) -> Node:
    hidden, patches = residual.shape
    heads = (hidden // shape.heads, shape.heads, patches)
    projected = _linear(graph, 3 * hidden, _norm(graph, residual, bias=True, in_place=False))
    query = graph.add(heads, graph.view(projected, *heads), positions, in_place=True)
    key = graph.add(heads, graph.view(projected, *heads), positions, in_place=True)
    value = graph.view(projected, *heads)
    key, value = (graph.add(heads, graph.view(kept, *heads), bytes_per_value=F16) for kept in (key, value))
    attended = graph.add(heads, graph.view(query, *heads), key, value)
    current = _linear(graph, hidden, graph.view(attended, hidden, patches))
    residual = graph.add(current.shape, current, residual, in_place=True)
    normed = _norm(graph, residual, bias=True, in_place=False)
    current = _feed_forward(graph, normed, shape.width, hidden)
    return graph.add(current.shape, residual, current, in_place=True)


def _merged(graph: Graph, shape: EncoderShape, current: Node, patches: int, *, normed: bool) -> Node:
    """The merger's output: patches that make one token, through its feed-forward network."""
    width = shape.hidden * shape.merge**2
    current = graph.view(current, width, patches // shape.merge**2)
    if normed:
        current = _norm(graph, current, bias=True, in_place=False)
    return _feed_forward(graph, current, width, shape.output)


def _stacked(graph: Graph, first: Node, second: Node) -> Node:
    return graph.add((first.shape[0] + second.shape[0], first.shape[1]), first, second)


def _feed_forward(graph: Graph, current: Node, width: int, output: int) -> Node:
    current = _linear(graph, width, current)
    return _linear(graph, output, graph.add(current.shape, current, in_place=True))


def _linear(graph: Graph, output: int, current: Node) -> Node:
    """A matrix and its bias."""
    product = graph.add((output, *current.shape[1:]), current)
    return graph.add(product.shape, product, in_place=True)


GRAPHS: Final = ModelGraphs(text_shape, encoder_shape, text_graph, encoder_graph, IMAGE_TOKENS)
