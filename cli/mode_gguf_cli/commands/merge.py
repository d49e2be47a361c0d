"""mode-gguf merge: from a type per expert to a type per tensor."""

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    model: options.Model,
    out: options.Out = None,
    types: options.MeasuredExpertTypes = None,
    dense_types: options.MeasuredDenseTypes = None,
    floor: options.Floors = None,
    calibration: options.Calibration = None,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    device: options.DeviceOption = options.Device.AUTO,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    mmproj_type: options.ProjectorOption = options.ProjectorType.F16,
    shard_size: options.ShardSize = None,
    threads: options.Threads = None,
    pre_tokenizer: options.PreTokenizer = None,
    json: options.Json = False,
) -> None:
    """Turn a plan with a type per expert into a file for stock llama.cpp: a type per tensor, the same budget.

    Types are chosen again from what was measured in the work folder, and MODEL's weights are packed again. Give the
    calibration options that `calibrate` had. The file with a type per expert stays.
    """
    from mode_gguf import pipeline
    from mode_gguf.allocation.plan import Plan

    checkpoint, folder = pipeline.open_model(model, out, progress())
    before = Plan.load(folder.plan)
    chosen = pipeline.ConvertOptions(
        budget=before.budget or options.budget_of(None, None, None),
        calibration=options.calibration_options(calibration, image_samples, text_samples, device, seed, memory),
        types=options.measured_types(folder, types, dense_types, floor or ()),
        projector_type=mmproj_type.value,
        pre_tokenizer=pre_tokenizer,
        shard_bytes=options.shard_bytes_of(shard_size),
        threads=threads,
    )
    text, mmproj = pipeline.merge(checkpoint, folder, chosen, progress())
    after = Plan.load(folder.plan)
    size = sum(file.stat().st_size for file in pipeline.model_files(checkpoint, folder, after, chosen.shard_bytes))
    if json:
        emit_json(
            {
                "model": str(text),
                "mmproj": str(mmproj),
                "bpw": after.bpw,
                "size_bytes": size,
                "predicted_cost": [plan.solver.objective if plan.solver else None for plan in (before, after)],
            }
        )
        return
    show(f"model    {text}  ({after.bpw:.3f} bpw, {size / 1e6:,.1f} MB)")
    show(f"mmproj   {mmproj}")
    if before.solver and after.solver:
        show(f"cost     {before.solver.objective:.6g} with a type per expert, {after.solver.objective:.6g} now")
