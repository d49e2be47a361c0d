"""Which importance matrix packs; free of torch, so that a conversion can be refused before anything is computed."""

from typing import Literal, TypeAlias, get_args

from mode_gguf.errors import UsageError

ImatrixKind: TypeAlias = Literal["plain", "fisher"]
"""`plain`: mean squares of a matrix's inputs, as llama-imatrix; `fisher`: the same weighed by gradients."""
IMATRIX_KINDS: tuple[ImatrixKind, ...] = get_args(ImatrixKind)


def check_imatrix_choice(kind: str, method: str) -> None:
    """Raises UsageError: an unknown kind, or one that sensitivity by `method` does not make."""
    if kind not in IMATRIX_KINDS:
        raise UsageError(f"unknown importance matrix {kind!r}: choose from {', '.join(IMATRIX_KINDS)}")
    if kind == "fisher" and method != "fisher":
        raise UsageError(
            f"--imatrix fisher needs gradients, and sensitivity by {method} computes none: "
            "use --preset mode, or --imatrix plain"
        )
