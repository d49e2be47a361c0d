"""The cache key of packed weights, rounded with feedback or exported."""

from typing import Any

from mode_gguf.allocation.plan import Plan
from mode_gguf.pipeline.run import Run, base_key
from mode_gguf.pipeline.stages.calibrate import Calibrate
from mode_gguf.vocabulary import ImatrixKind


def packed_key(run: Run, plan: Plan, imatrix: ImatrixKind | None, calibrate: Calibrate | None) -> dict[str, Any]:
    """The settings of a stage that packs a plan's tensors.

    Args:
        imatrix: that packs; None for the one that the plan's measurements were packed with.
        calibrate: the stage on whose samples weights are rounded with feedback; None where they are rounded to nearest.
    """
    folder, kind = run.folder, imatrix or plan.made_from.imatrix_kind
    settings = {
        **base_key(run.checkpoint, "text model"),
        "plan": plan.fingerprint,
        "imatrix": kind,
        "imatrix file": run.cache.identity(folder.imatrix_of(kind)),
        "rounding": "nearest" if calibrate is None else "feedback",
    }
    if calibrate is not None:
        settings["calibration"] = calibrate.key(run)
    if calibrate is not None and kind == "fisher":
        settings["token weights"] = run.cache.identity(folder.token_weights)
    return settings
