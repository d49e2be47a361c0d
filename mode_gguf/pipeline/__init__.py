"""Runs the stages on one work folder: calibrate, sensitivity, plan, export, validate.

Each `run_` function reads what earlier stages left in the folder, writes its own artefacts, and can be called alone.
`convert` chains them. Stages that need torch import it when they run, so that planning and exporting start at once.
"""

from mode_gguf.pipeline.conversion import Base, convert, estimate, merge, open_model, outlined_model
from mode_gguf.pipeline.exporting import (
    REFERENCE_TYPE,
    export_text,
    model_files,
    model_path,
    projector_path,
    run_export,
    run_reference,
)
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.pipeline.measuring import run_calibration, run_sensitivity, run_unit_kl
from mode_gguf.pipeline.model_files import ModelFiles, find_model_files
from mode_gguf.pipeline.options import (
    DEFAULT_MEASURED_SAMPLES,
    CalibrationOptions,
    ConvertOptions,
    ConvertResult,
    Estimate,
)
from mode_gguf.pipeline.planning import (
    make_uniform_plan,
    planning_problem,
    run_frontier,
    run_granularity,
    run_plan,
    run_refined_plan,
    save_plan,
    with_unit_kl,
)
from mode_gguf.pipeline.publishing import publish, write_card
from mode_gguf.pipeline.reporting import conversion_of, draw_validated, run_report
from mode_gguf.pipeline.rounding import run_rounding
from mode_gguf.pipeline.validating import environment, run_validation, runtime_speed

__all__ = [
    "DEFAULT_MEASURED_SAMPLES",
    "REFERENCE_TYPE",
    "Base",
    "CalibrationOptions",
    "ConvertOptions",
    "ConvertResult",
    "Estimate",
    "ModelFiles",
    "conversion_of",
    "convert",
    "draw_validated",
    "environment",
    "estimate",
    "export_text",
    "find_model_files",
    "folder_lock",
    "make_uniform_plan",
    "merge",
    "model_files",
    "model_path",
    "open_model",
    "outlined_model",
    "planning_problem",
    "projector_path",
    "publish",
    "run_calibration",
    "run_export",
    "run_frontier",
    "run_granularity",
    "run_plan",
    "run_reference",
    "run_refined_plan",
    "run_report",
    "run_rounding",
    "run_sensitivity",
    "run_unit_kl",
    "run_validation",
    "runtime_speed",
    "save_plan",
    "with_unit_kl",
    "write_card",
]
