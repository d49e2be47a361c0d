"""mode-gguf unit-kl: the KL divergence that every tensor in every type causes."""

from dataclasses import replace

from mode_gguf.recipe import Recipe
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.generated import with_recipe


@with_recipe("sensitivity", "compute")
def command(recipe: Recipe, model: arguments.Model, out: arguments.Out = None, json: arguments.Json = False) -> None:
    """Measure the KL divergence that each tensor of MODEL in each type causes, by modality and kind of answer.

    Needs the results of `sensitivity` in the work folder, and packs as it did. Prints its predictions beside what was
    measured, if they are KL divergences, too. Interrupted, it continues where it was.
    """
    from mode_gguf import pipeline
    from mode_gguf.importance.sensitivity_table import SensitivityTable
    from mode_gguf.importance.unit_kl_table import UnitKl, compare_kl

    run = pipeline.open_model(model, out, recipe, progress())
    sensitivity = pipeline.MeasureSensitivity.of_folder(run, recipe.compute)
    sensitivity = replace(sensitivity, types=pipeline.measured_candidates(recipe, run.folder))
    with pipeline.folder_lock(run.folder):
        run.ensure(pipeline.MeasureUnitKl(sensitivity, recipe.sensitivity.measured_samples))
    measured, table = UnitKl.load(run.folder.unit_kl), SensitivityTable.load(run.folder.sensitivity)
    rows = compare_kl(measured, table) if table.method == "fisher" else []
    if json:
        emit_json(
            {
                "unit_kl": str(run.folder.unit_kl),
                "positions": {"text": measured.positions[0], "image": measured.positions[1]},
                "compared": [
                    {"part": row.part, "type": row.quant_type, "predicted": row.predicted, "measured": row.measured}
                    for row in rows
                ],
            }
        )
        return
    positions = f"{measured.positions[0]} text and {measured.positions[1]} image positions"
    show(f"unit-kl  {run.folder.unit_kl}  (on {positions})")
    if rows:
        show(f"{'':<22}{'':<8}{'text: predicted, measured':>28}{'image: predicted, measured':>30}")
    for row in rows:
        text, image = (f"{p:.6f} {m:.6f}" for p, m in zip(row.predicted, row.measured, strict=True))
        show(f"{row.part:<22}{row.quant_type:<8}{text:>28}{image:>30}")
