"""mode-gguf calibrate: samples to statistics and importance matrix."""

from dataclasses import asdict

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    model: options.Model,
    out: options.Out = None,
    calibration: options.Calibration = None,
    device: options.DeviceOption = options.Device.AUTO,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    key_ratio: options.KeyRatio = options.DEFAULT_KEY_RATIO,
    key_tokens: options.KeyTokensOption = options.KeyTokensName.TEXT_ATTENTION,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    json: options.Json = False,
) -> None:
    """Run MODEL on text and images; count expert use per modality and write the importance matrix.

    Writes calibration.safetensors and a stock imatrix GGUF, good for any budget afterwards.
    """
    from mode_gguf import pipeline
    from mode_gguf.calibration.coverage import calibration_warnings

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
    with pipeline.folder_lock(folder):
        statistics = pipeline.run_calibration(checkpoint, folder, chosen, progress())
    counts = asdict(statistics.samples)
    never = {layer.layer: layer.never_routed for layer in statistics.coverage() if any(layer.never_routed.values())}
    if json:
        files = {"calibration": str(folder.calibration), "imatrix": str(folder.imatrix)}
        warnings = calibration_warnings(statistics)
        emit_json({**files, "samples": counts, "never_routed": never, "warnings": warnings})
        return
    show(f"statistics  {folder.calibration}")
    show(f"imatrix     {folder.imatrix}")
    show("samples     " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
