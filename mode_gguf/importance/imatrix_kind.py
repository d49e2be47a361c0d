"""Which importance matrix packs; free of torch, so that a conversion can be refused before anything is computed."""

from typing import Literal, TypeAlias, get_args

from mode_gguf.errors import UsageError

ImatrixKind: TypeAlias = Literal["plain", "fisher"]
"""`plain`: mean squares of a matrix's inputs, as llama-imatrix; `fisher`: the same weighed by gradients."""
IMATRIX_KINDS: tuple[ImatrixKind, ...] = get_args(ImatrixKind)


def chosen_imatrix(kind: str | None, method: str) -> ImatrixKind:
    """The importance matrix that packs: `kind`, or if that is None, `fisher` where `method` makes one.

    Raises:
        UsageError: an unknown kind, or one that sensitivity by `method` does not make.
    """
    match kind:
        case None:
            return "fisher" if method == "fisher" else "plain"
        case "fisher" if method != "fisher":
            raise UsageError(
                f"--imatrix fisher needs gradients, and sensitivity by {method} computes none: "
                "use --preset mode, or --imatrix plain"
            )
        case "plain" | "fisher":
            return kind
    raise UsageError(f"unknown importance matrix {kind!r}: choose from {', '.join(IMATRIX_KINDS)}")
