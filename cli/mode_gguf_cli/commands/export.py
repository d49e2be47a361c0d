"""mode-gguf export: GGUF files from a plan."""

from typing import Annotated

import typer

from mode_gguf.options import OUTPUT
from mode_gguf.recipe import Recipe
from mode_gguf.sizes import decimal_size
from mode_gguf.vocabulary import ImatrixKind, Rounding
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.generated import with_recipe


@with_recipe("export", "compute")
def command(
    recipe: Recipe,
    model: arguments.Model,
    out: arguments.Out = None,
    plan: arguments.PlanFile = None,
    imatrix: Annotated[
        ImatrixKind | None,
        typer.Option(
            help="Importance matrix to pack with; default: the one the plan was made with.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    rounding: Annotated[
        Rounding | None,
        typer.Option(help="How weights are rounded; default: as planned.", show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    json: arguments.Json = False,
) -> None:
    """Pack MODEL's weights as the plan says; writes the text GGUF and the projector.

    Uses an importance matrix in the work folder; without a plain one it packs plainly. What is rounded with feedback
    runs the samples of `calibrate` through MODEL once more, layer by layer; cut off, it goes on where it was. With
    --mtp the block for multi-token prediction becomes a file, too, which llama-server drafts with:
    [bold]-md mtp-….gguf --spec-type draft-mtp[/bold].
    """
    from mode_gguf import pipeline
    from mode_gguf.architectures import projector_tensors

    run = pipeline.open_model(model, out, recipe, progress())
    followed = pipeline.followed_plan(run.folder, plan)
    text = pipeline.ExportText(followed, recipe.export, recipe.compute, imatrix=imatrix, rounding=rounding)
    projector = pipeline.ExportProjector(recipe.export.mmproj_type)
    mtp = pipeline.ExportMtp(recipe.export.mtp, recipe.compute) if recipe.export.mtp else None
    with pipeline.folder_lock(run.folder):
        run.ensure(text)
        if plan is None:
            pipeline.save_tensor_types(run.folder, followed)
        if has_projector := bool(projector_tensors(run.checkpoint)):
            run.ensure(projector)
        if mtp:
            run.ensure(mtp)
    files = text.outputs(run)
    mmproj = projector.outputs(run)[0] if has_projector else None
    drafts = mtp.outputs(run)[0] if mtp else None
    size = sum(file.stat().st_size for file in files)
    if json:
        optional = {"mmproj": str(mmproj) if mmproj else None, "mtp": str(drafts) if drafts else None}
        emit_json({"model": str(files[0]), **optional, "bpw": followed.bpw, "size_bytes": size})
        return
    show(f"model    {files[0]}  ({followed.bpw:.3f} bpw, {decimal_size(size)})")
    for name, path in (("mmproj", mmproj), ("mtp", drafts)):
        if path:
            show(f"{name:<8} {path}")
