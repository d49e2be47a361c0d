"""mode-gguf sensitivity: what quantization would do, by expert, projection, modality and type."""

from mode_gguf.recipe import Recipe
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.generated import with_recipe


@with_recipe("sensitivity", "compute")
def command(recipe: Recipe, model: arguments.Model, out: arguments.Out = None, json: arguments.Json = False) -> None:
    """Measure, per expert, projection, modality and type, what quantization would do to MODEL's answers.

    Needs the results of `calibrate` in the work folder, whose samples it runs once more. Fisher sensitivity also writes
    the Fisher importance matrix, whichever one the candidates are packed with.
    """
    from mode_gguf import pipeline

    run = pipeline.open_model(model, out, recipe, progress())
    stage = pipeline.MeasureSensitivity.of(
        pipeline.Calibrate.of_folder(run, recipe.compute),
        recipe.sensitivity,
        pipeline.candidates_of(recipe, run.folder),
    )
    with pipeline.folder_lock(run.folder):
        run.ensure(stage)
    fisher_imatrix = run.folder.imatrix_of("fisher") if stage.method == "fisher" else None
    if json:
        files = {"sensitivity": str(run.folder.sensitivity)}
        if fisher_imatrix:
            files["imatrix"] = str(fisher_imatrix)
        emit_json({**files, "method": stage.method, "packed_with": stage.imatrix})
        return
    show(f"sensitivity  {run.folder.sensitivity}  ({stage.method})")
    if fisher_imatrix:
        show(f"imatrix      {fisher_imatrix}")
