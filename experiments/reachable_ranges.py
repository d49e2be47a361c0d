"""Bits per weight that the default candidates reach on models whose rows no K-quant fits, from their shapes alone.

    python experiments/reachable_ranges.py

The shapes are the matrices of the text models (routers, norms and biases left out, which are a few thousandths), as the
models' configurations give them; no checkpoint is read. `convert --dry-run` says the same of a checkpoint.
"""

from dataclasses import dataclass, replace

from experiment_command import command_parser
from mode_gguf.allocation.budget import Budget, check_reachable
from mode_gguf.allocation.units import DEFAULT_TYPES, CandidateTypes, fitting_types, tensor_bytes
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.quantization.types import QUANT_TYPES


@dataclass(frozen=True, slots=True)
class Shape:
    """A text model: `attention` and `dense` are (rows, columns) of a layer's matrices, `first` of the layers without
    experts, of which there are `n_first`.
    """

    name: str
    hidden: int
    layers: int
    vocabulary: int
    experts: int
    width: int
    attention: tuple[tuple[int, int], ...]
    dense: tuple[tuple[int, int], ...]
    first: tuple[tuple[int, int], ...] = ()
    n_first: int = 0
    tied: bool = False


def feed_forward(hidden: int, width: int) -> tuple[tuple[int, int], ...]:
    """Gate, up and down."""
    return (width, hidden), (width, hidden), (hidden, width)


SHAPES = (
    Shape(
        "Gemma 4 26B-A4B",
        2816,
        30,
        262144,
        128,
        704,
        attention=((4096, 2816), (2048, 2816), (2048, 2816), (2816, 4096)),
        dense=feed_forward(2816, 2112),
        tied=True,
    ),
    Shape(
        "GLM-4.5V 106B-A12B",
        4096,
        46,
        151552,
        128,
        1408,
        attention=((12288, 4096), (1024, 4096), (1024, 4096), (4096, 12288)),
        dense=feed_forward(4096, 1408),
        first=feed_forward(4096, 10944),
        n_first=1,
    ),
    Shape(
        "Kimi-VL-A3B",
        2048,
        27,
        163840,
        64,
        1408,
        attention=((3072, 2048), (576, 2048), (16 * 512, 128), (16 * 128, 512), (2048, 2048)),
        dense=feed_forward(2048, 2816),
        first=feed_forward(2048, 11264),
        n_first=1,
    ),
)


def unread(_: int, rows: slice = ALL_ROWS) -> Array:
    raise AssertionError("shapes have no weights")


def tensors_of(shape: Shape) -> list[SourceTensor]:
    """The model's matrices."""

    def matrix(name: str, rows: tuple[int, ...], role: Role, layer: int | None = None) -> SourceTensor:
        return SourceTensor(name, rows, role, (), unread, None if role is Role.EMBEDDING else name, layer)

    table = (shape.vocabulary, shape.hidden)
    tensors = [matrix("token_embd.weight", table, Role.EMBEDDING)]
    if not shape.tied:
        tensors.append(matrix("output.weight", table, Role.OUTPUT))
    for layer in range(shape.layers):
        has_experts = layer >= shape.n_first
        dense = (*shape.attention, *(shape.dense if has_experts else shape.first))
        tensors += [matrix(f"blk.{layer}.{i}", rows, Role.DENSE, layer) for i, rows in enumerate(dense)]
        if has_experts:
            tensors += [
                matrix(f"blk.{layer}.experts.{i}", (shape.experts, *rows), Role.EXPERT, layer)
                for i, rows in enumerate(feed_forward(shape.hidden, shape.width))
            ]
    return tensors


def reach(tensors: list[SourceTensor], types: CandidateTypes) -> tuple[float, float]:
    """Lowest and highest bits per weight."""
    n_weights = sum(tensor.n_weights for tensor in tensors)
    sizes = [[tensor_bytes(tensor, one) for one in types.of(tensor)] for tensor in tensors]
    return tuple(8 * sum(map(end, sizes)) / n_weights for end in (min, max))  # type: ignore[return-value]


def main() -> None:
    command_parser(__doc__).parse_args()
    wide = replace(DEFAULT_TYPES, expert=(QUANT_TYPES["IQ2_XXS"], *DEFAULT_TYPES.expert))
    print("| model | weights | in rows that no K-quant fits | reachable | with IQ2_XXS | if Q8_0 alone stood in |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        tensors = tensors_of(shape)
        n_weights = sum(tensor.n_weights for tensor in tensors)
        odd = [tensor for tensor in tensors if tensor.row_width % 256]
        share = sum(tensor.n_weights for tensor in odd) / n_weights
        low, high = reach(tensors, DEFAULT_TYPES)
        with_iq, _ = reach(tensors, wide)
        smallest = [
            fitting_types(t, [QUANT_TYPES["Q8_0"] if t.row_width % 256 else QUANT_TYPES["Q2_K"]])[0] for t in tensors
        ]
        before = 8 * sum(map(tensor_bytes, tensors, smallest)) / n_weights
        print(
            f"| {shape.name} | {n_weights / 1e9:.1f} B | {100 * share:.1f} % | {low:.2f} to {high:.2f} | "
            f"from {with_iq:.2f} | from {before:.2f} |"
        )
    try:
        check_reachable(tensors_of(SHAPES[0]), DEFAULT_TYPES, Budget(value=3.0))
    except InfeasibleBudgetError as error:
        print(f"\n{SHAPES[0].name}: {error}")


if __name__ == "__main__":
    main()
