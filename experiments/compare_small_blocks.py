"""What types of 32 weights leave of error, beside K-quants of as many bits: output error of drawn matrices.

    python experiments/compare_small_blocks.py

Weights are heavy-tailed (Student's t of 5 degrees of freedom), inputs correlated as real ones are (a few directions and
a little of everything). The error is that of the outputs relative to their power, rounded to nearest and with feedback.
"""

import numpy as np

from experiment_command import command_parser
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf_kernels import Feedback, Refinement, pack, round_again, unpack

ROWS, COLUMNS, DIRECTIONS, TOKENS = 256, 768, 60, 4000
TYPES = ("Q4_K", "Q4_0", "IQ4_NL", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0")


def moments_of(generator: np.random.Generator) -> np.ndarray:
    """Second moments of the inputs."""
    inputs = generator.standard_normal((TOKENS, DIRECTIONS)) @ generator.standard_normal((DIRECTIONS, COLUMNS))
    inputs *= np.exp(0.5 * generator.standard_normal(COLUMNS))
    inputs += 2 * generator.standard_normal(inputs.shape)
    moments: np.ndarray = inputs.T @ inputs / TOKENS
    return moments


def main() -> None:
    command_parser(__doc__).parse_args()
    generator = np.random.default_rng(0)
    moments = moments_of(generator)
    matrix = (0.02 * generator.standard_t(5, (ROWS, COLUMNS))).astype(np.float32)
    upper = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    feedback = Feedback(moments.astype(np.float32), (upper / np.diag(upper)).astype(np.float32))
    importance = np.diag(moments).astype(np.float32)
    power = np.einsum("ri,ij,rj->", matrix, moments, matrix, optimize=True)

    def error(packed: np.ndarray, name: str) -> str:
        change = unpack(packed, name, COLUMNS).astype(np.float64) - matrix
        return f"{np.einsum('ri,ij,rj->', change, moments, change, optimize=True) / power:.3e}"

    print("| type | bits per weight | exact | refined | with feedback |\n|---|---|---|---|---|")
    for name in TYPES:
        refined = pack(matrix, name, importance, refinement=Refinement())
        found = [error(pack(matrix, name, importance), name), error(refined, name), "-"]
        if name != "Q8_0":
            round_again(refined, name, matrix, feedback)
            found[2] = error(refined, name)
        print(f"| {name} | {QUANT_TYPES[name].bits_per_weight:.4g} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
