"""The plan of a work folder as it is followed: also when it was edited, whatever its records still say."""

from pathlib import Path

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.workfolder import WorkFolder


def followed_plan(folder: WorkFolder, path: Path | None = None) -> Plan:
    """The plan in `path`, by default the folder's; one that is not what `plan` wrote proves nothing about its types.

    Raises:
        InputError: it is not there, or makes no sense; the message names the field.
    """
    plan = Plan.load(path or folder.plan)
    cache = StageCache(folder)
    written = None if path else cache.last_run("plan")[1].get(folder.plan)
    return plan.as_edited() if written and written != cache.identity(folder.plan) else plan


def check_tensors(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a plan whose tensors are not the checkpoint's, so that its sizes are none of the file's.

    Raises:
        InputError: naming the tensor.
    """
    expected = {tensor.name: tensor.n_weights for tensor in text_tensors(checkpoint)}
    for tensor in plan.tensors:
        if tensor.name not in expected:
            raise InputError(
                f"the plan has a type for {tensor.name:.200}, which the model does not have; make a new plan"
            )
        if tensor.n_weights != expected[tensor.name]:
            raise InputError(
                f"the plan gives {tensor.name} {tensor.n_weights} weights, the model has {expected[tensor.name]}; "
                "correct n_weights, or make a new plan"
            )
    if missing := expected.keys() - {tensor.name for tensor in plan.tensors}:
        raise InputError(f"the plan has no type for {min(missing)}; make a new plan")
