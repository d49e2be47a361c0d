"""mode-gguf sensitivity: what every type would cost every tensor and expert."""

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    model: options.Model,
    out: options.Out = None,
    calibration: options.Calibration = None,
    device: options.DeviceOption = options.Device.AUTO,
    preset: options.PresetOption = options.PresetName.MODE,
    sensitivity: options.MetricOption = None,
    imatrix: options.ImatrixOption = None,
    packing: options.PackingOption = options.PackingMode.REFINED,
    effort: options.EffortOption = options.Effort.DEFAULT,
    size_power: options.SizePower = options.DEFAULT_SIZE_POWER,
    types: options.ExpertTypes = options.DEFAULT_EXPERT_TYPES,
    dense_types: options.DenseTypes = options.DEFAULT_DENSE_TYPES,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    key_ratio: options.KeyRatio = options.DEFAULT_KEY_RATIO,
    key_tokens: options.KeyTokensOption = options.KeyTokensName.TEXT_ATTENTION,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    json: options.Json = False,
) -> None:
    """Measure, per expert, projection, modality and type, what quantization would do to MODEL's answers.

    Needs the results of `calibrate` in the work folder, and the same samples again. With --preset mode it also writes
    the Fisher importance matrix, whichever --imatrix the candidates are packed with.
    """
    from mode_gguf import pipeline
    from mode_gguf.importance.imatrix_kind import chosen_imatrix

    chosen = options.calibration_options(
        calibration,
        image_samples,
        text_samples,
        device,
        seed,
        memory,
        key_ratio=key_ratio,
        key_tokens=key_tokens,
    )
    checkpoint, folder = pipeline.open_model(model, out, progress())
    method = options.preset_of(preset, sensitivity).method
    candidates = options.candidate_types(types, dense_types)
    with pipeline.folder_lock(folder):
        pipeline.run_sensitivity(
            checkpoint,
            folder,
            chosen,
            method,
            candidates,
            imatrix=imatrix.value if imatrix else None,
            packing=options.packing_of(packing, effort, size_power),
            progress=progress(),
        )
    fisher_imatrix = folder.imatrix_of("fisher") if method == "fisher" else None
    if json:
        files = {"sensitivity": str(folder.sensitivity)}
        if fisher_imatrix:
            files["imatrix"] = str(fisher_imatrix)
        emit_json({**files, "method": method, "packed_with": chosen_imatrix(imatrix, method)})
        return
    show(f"sensitivity  {folder.sensitivity}  ({method})")
    if fisher_imatrix:
        show(f"imatrix      {fisher_imatrix}")
