"""What a base GGUF and an importance matrix leave of the options, and what a user should know of them."""

from dataclasses import replace
from pathlib import Path
from typing import Final

from mode_gguf.allocation.units import UNMEASURED
from mode_gguf.architectures import projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import UsageError
from mode_gguf.pipeline.options import ConvertOptions

BLIND_METHOD: Final = "imatrix-error"


def resolve_options(checkpoint: Checkpoint, options: ConvertOptions) -> ConvertOptions:
    """The options with what follows from the base and from where statistics come from.

    Raises:
        UsageError: an option asks for what these cannot give.
    """
    if checkpoint.base is not None:
        options = _with_base(checkpoint, options)
    if options.calibration.from_imatrix is not None:
        options = _without_model(options, options.calibration.from_imatrix)
    if options.preset.method == BLIND_METHOD and options.preset.costs.combination != "sensitivity":
        raise UsageError(
            f"--combine {options.preset.costs.combination} and sensitivity {BLIND_METHOD}, which holds frequency "
            "already, do not go together; leave it out"
        )
    return options


def base_warnings(checkpoint: Checkpoint) -> list[str]:
    """What is not known of a model that comes from a base GGUF."""
    base = checkpoint.base
    if base is None or not base.unmatched:
        return []
    n_dense = sum(tensor.role in (Role.DENSE, Role.OUTPUT) for tensor in text_tensors(checkpoint))
    shown = ", ".join(base.unmatched[:3])
    return [
        f"{len(base.unmatched)} of {n_dense} matrices beside the experts equal no matrix of the checkpoint ({shown}"
        f"{', ...' if len(base.unmatched) > 3 else ''}): they are planned without statistics, in {UNMEASURED.name} "
        "within the layers"
    ]


def _with_base(checkpoint: Checkpoint, options: ConvertOptions) -> ConvertOptions:
    if options.pre_tokenizer is not None:
        raise UsageError("--pre-tokenizer: the base GGUF has its tokenizer; leave the option out with --base-gguf")
    if options.granularity == "expert":
        raise UsageError(
            "--granularity expert needs a llama.cpp of ours, which knows families alone; leave it out with --base-gguf"
        )
    if options.budget.fit is not None:
        raise UsageError("--fit knows what memory families take alone; give --size or --bpw with --base-gguf")
    if options.preset.unit_kl or options.refine:
        raise UsageError("--unit-kl and --refine measure models of families alone; leave them out with --base-gguf")
    if not projector_tensors(checkpoint) and options.calibration.image_samples:
        options = replace(options, calibration=replace(options.calibration, image_samples=0))
    return options


def _without_model(options: ConvertOptions, imatrix: Path) -> ConvertOptions:
    preset = options.preset
    given = f"--calibration-from {imatrix}"
    if preset.name != "mode" or preset.method not in ("fisher", BLIND_METHOD):
        raise UsageError(
            f"{given}: costs are errors weighed by importance ({BLIND_METHOD}); leave --preset and "
            "--sensitivity out, which need the model run"
        )
    if options.rounding == "feedback":
        raise UsageError(f"{given}: --rounding feedback needs the model run on samples; leave it out")
    if options.imatrix == "fisher":
        raise UsageError(f"{given}: --imatrix fisher needs gradients of the model; leave it out")
    if preset.unit_kl or options.refine:
        raise UsageError(f"{given}: --unit-kl and --refine run the model; leave them out")
    if options.calibration.source is not None:
        raise UsageError(f"{given} and --calibration are two sources of statistics; give one of them")
    return replace(options, preset=replace(preset, method=BLIND_METHOD), rounding="nearest")
