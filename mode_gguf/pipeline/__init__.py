# mypy: implicit-reexport
# ruff: noqa: F401
"""A conversion as stages on one work folder: calibrate, sensitivity, plan, export, validate.

`open_model` makes a `Run`; `run.ensure(stage)` executes a stage unless what it left is still right, and `convert`
ensures all of them. Stages meet in files only. Those that need torch import it when they run, so that planning and
exporting start at once.
"""

from mode_gguf.pipeline.conversion import ConvertResult, convert, estimate_conversion
from mode_gguf.pipeline.environment import environment, runtime_speed
from mode_gguf.pipeline.estimating import ConversionEstimate
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.pipeline.followed_plan import followed_plan
from mode_gguf.pipeline.model_files import ModelFiles, find_model_files
from mode_gguf.pipeline.opened_model import open_model, outlined_model
from mode_gguf.pipeline.planning import make_frontier, make_uniform_plan
from mode_gguf.pipeline.publishing import publish, write_card
from mode_gguf.pipeline.reporting import conversion_of, draw_validated, run_report
from mode_gguf.pipeline.run import Run
from mode_gguf.pipeline.samples_key import calibration_samples
from mode_gguf.pipeline.settings import PlanSettings, candidates_of, measured_candidates, with_measured_packing
from mode_gguf.pipeline.stages.calibrate import Calibrate
from mode_gguf.pipeline.stages.export import ExportMtp, ExportProjector, ExportReference, ExportText
from mode_gguf.pipeline.stages.feedback import RoundWithFeedback
from mode_gguf.pipeline.stages.plan import MakePlan, save_plan, save_tensor_types
from mode_gguf.pipeline.stages.sensitivity import MeasureSensitivity
from mode_gguf.pipeline.stages.unit_kl import MeasureUnitKl
from mode_gguf.pipeline.stages.validate import Notes, probes_beside, validate_file
