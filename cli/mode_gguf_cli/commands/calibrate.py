"""mode-gguf calibrate: expert use per modality, and the importance matrix."""

from dataclasses import asdict

from mode_gguf.recipe import Recipe
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.generated import with_recipe


@with_recipe("calibration", "compute")
def command(recipe: Recipe, model: arguments.Model, out: arguments.Out = None, json: arguments.Json = False) -> None:
    """Run MODEL on text and images; count expert use per modality and write the importance matrix.

    Writes calibration.safetensors and a stock imatrix GGUF, good for any budget afterwards. Later stages take samples,
    seed and key tokens from there.
    """
    from mode_gguf import pipeline
    from mode_gguf.calibration.coverage import calibration_warnings
    from mode_gguf.calibration.statistics import CalibrationStatistics

    run = pipeline.open_model(model, out, recipe, progress())
    with pipeline.folder_lock(run.folder):
        run.ensure(pipeline.Calibrate(recipe.calibration, recipe.compute))
    statistics = CalibrationStatistics.load(run.folder.calibration, sums=False)
    counts = asdict(statistics.samples)
    never = {layer.layer: layer.never_routed for layer in statistics.coverage() if any(layer.never_routed.values())}
    if json:
        files = {"calibration": str(run.folder.calibration), "imatrix": str(run.folder.imatrix)}
        warnings = calibration_warnings(statistics)
        emit_json({**files, "samples": counts, "never_routed": never, "warnings": warnings})
        return
    show(f"statistics  {run.folder.calibration}")
    show(f"imatrix     {run.folder.imatrix}")
    show("samples     " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
