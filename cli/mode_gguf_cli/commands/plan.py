"""mode-gguf plan: types under a budget."""

from typing import TYPE_CHECKING

from mode_gguf.recipe import Recipe
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.generated import with_recipe
from mode_gguf_cli.memory import memory_json, show_memory

if TYPE_CHECKING:
    from mode_gguf.allocation.plan import Plan
    from mode_gguf.pipeline import Run


@with_recipe("plan", "sensitivity", "export.mmproj_type", "compute")
def command(recipe: Recipe, model: arguments.Model, out: arguments.Out = None, json: arguments.Json = False) -> None:
    """Choose the types of all tensors under a budget; writes plan.json and tensor-types.txt.

    Needs the results of `sensitivity` in the work folder, except with --uniform, and packs as it packed its candidates.
    The plan may be edited by hand; `export` follows it.
    """
    from mode_gguf import pipeline

    run = pipeline.open_model(model, out, recipe, progress())
    if recipe.plan.uniform:
        _plan_uniformly(run, recipe)
    else:
        candidates = pipeline.measured_candidates(recipe, run.folder)
        measured = pipeline.MeasureSensitivity.of_folder(run, recipe.compute)
        settings = pipeline.PlanSettings.of(pipeline.with_measured_packing(recipe, measured.packing), candidates)
        with pipeline.folder_lock(run.folder):
            run.ensure(pipeline.MakePlan(settings, measured))
    made = pipeline.followed_plan(run.folder)
    types_file = None if made.has_expert_groups else run.folder.tensor_types
    if not json:
        _show(made, run)
        return
    emit_json(
        {
            "plan": str(run.folder.plan),
            "tensor_types": str(types_file) if types_file else None,
            "bpw": made.bpw,
            "experts_bpw": made.experts_bpw,
            "size_bytes": made.size_bytes,
            "predicted_cost": made.solver.objective if made.solver else None,
            "gap": made.solver.gap if made.solver else None,
            "memory": memory_json(made.memory),
            "refinement": [trial.model_dump() for trial in made.refinement or ()],
        }
    )


def _plan_uniformly(run: "Run", recipe: Recipe) -> None:
    from mode_gguf import pipeline
    from mode_gguf.quantization.libggml import check_available
    from mode_gguf.quantization.types import quant_type

    chosen = quant_type(recipe.plan.uniform or "")
    check_available([chosen])
    plan = pipeline.make_uniform_plan(
        run,
        chosen,
        imatrix=recipe.sensitivity.imatrix,
        packing=recipe.sensitivity.packing,
        rounding=recipe.plan.rounding or "nearest",
    )
    with pipeline.folder_lock(run.folder):
        run.cache.forget("plan")
        pipeline.save_plan(run.folder, plan)


def _show(made: "Plan", run: "Run") -> None:
    show(f"plan          {run.folder.plan}")
    if made.has_expert_groups:
        show("              experts of a layer differ in type: the file will need mode-gguf's build of llama.cpp")
    else:
        show(f"tensor types  {run.folder.tensor_types}")
    show(f"bpw           {made.bpw:.4f} (experts {made.experts_bpw:.4f})")
    show_memory(made.memory)
    if made.solver:
        show(f"cost          {made.solver.objective:.6g}, proven to {made.solver.gap:.1e}")
    for trial in made.refinement or ():
        text, image = trial.kl
        verdict = "taken" if trial.accepted else "left"
        show(f"measured      text {text:.5f}, image {image:.5f}, {len(trial.moved)} tensors moved: {verdict}")
