"""Choice of the importance matrix for packing; free of torch, so that a conversion can be refused at once."""

from mode_gguf.errors import UsageError
from mode_gguf.vocabulary import IMATRIX_KINDS, ImatrixKind


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
                f"sensitivity.imatrix fisher needs gradients, and sensitivity by {method} computes none: "
                "use --preset mode, or sensitivity.imatrix plain"
            )
        case "plain" | "fisher":
            return kind
    raise UsageError(f"unknown importance matrix {kind!r}: choose from {', '.join(IMATRIX_KINDS)}")
