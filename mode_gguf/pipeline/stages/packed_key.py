"""The cache key of packed weights, rounded with feedback or exported."""

from typing import Any

from mode_gguf.allocation.plan import Plan
from mode_gguf.pipeline.run import Run, base_key
from mode_gguf.pipeline.stage_cache import file_identity
from mode_gguf.vocabulary import ImatrixKind, Rounding


def packed_key(run: Run, plan: Plan, imatrix: ImatrixKind | None, rounding: Rounding) -> dict[str, Any]:
    """The settings of a stage that packs a plan's tensors.

    Args:
        imatrix: that packs; None for the one that the plan's measurements were packed with.
    """
    folder, kind = run.folder, imatrix or plan.made_from.imatrix_kind
    settings = {
        **base_key(run.checkpoint, "text model"),
        "plan": plan.fingerprint,
        "imatrix": kind,
        "imatrix file": file_identity(folder.imatrix_of(kind)),
        "rounding": rounding,
    }
    if rounding == "feedback" and kind == "fisher":
        settings["token weights"] = file_identity(folder.token_weights)
    return settings
