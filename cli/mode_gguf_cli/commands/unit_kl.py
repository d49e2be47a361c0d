"""mode-gguf unit-kl: what every type really does to every tensor, measured."""

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    model: options.Model,
    out: options.Out = None,
    calibration: options.Calibration = None,
    measured_samples: options.MeasuredSamples = options.DEFAULT_MEASURED_SAMPLES,
    device: options.DeviceOption = options.Device.AUTO,
    types: options.MeasuredExpertTypes = None,
    dense_types: options.MeasuredDenseTypes = None,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    json: options.Json = False,
) -> None:
    """Measure the KL divergence that each tensor of MODEL in each type causes, by modality and kind of answer.

    Needs the results of `sensitivity` in the work folder, and packs as it did. Prints its predictions beside what was
    measured, if they are KL divergences, too. Interrupted, it continues where it was.
    """
    from mode_gguf import pipeline
    from mode_gguf.importance.sensitivity_table import SensitivityTable
    from mode_gguf.importance.unit_kl_table import compared

    chosen = options.calibration_options(calibration, image_samples, text_samples, device, seed, memory)
    checkpoint, folder = pipeline.open_model(model, out, progress())
    table = SensitivityTable.load(folder.sensitivity)
    candidates = options.measured_types(folder, types, dense_types)
    with pipeline.folder_lock(folder):
        measured = pipeline.run_unit_kl(
            checkpoint, folder, chosen, candidates, sample_budget=measured_samples, progress=progress()
        )
    rows = compared(measured, table) if table.method == "fisher" else []
    if json:
        emit_json(
            {
                "unit_kl": str(folder.unit_kl),
                "positions": {"text": measured.positions[0], "image": measured.positions[1]},
                "compared": [
                    {"part": row.part, "type": row.quant_type, "predicted": row.predicted, "measured": row.measured}
                    for row in rows
                ],
            }
        )
        return
    show(f"unit-kl  {folder.unit_kl}  (on {measured.positions[0]} text and {measured.positions[1]} image positions)")
    if rows:
        show(f"{'':<22}{'':<8}{'text: predicted, measured':>28}{'image: predicted, measured':>30}")
    for row in rows:
        text, image = (f"{p:.6f} {m:.6f}" for p, m in zip(row.predicted, row.measured, strict=True))
        show(f"{row.part:<22}{row.quant_type:<8}{text:>28}{image:>30}")
