"""mode-gguf convert: all stages."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mode_gguf.options import RUN
from mode_gguf.plain_text import shell_line
from mode_gguf.recipe import Recipe
from mode_gguf.sizes import binary_size, decimal_size
from mode_gguf_cli import arguments
from mode_gguf_cli.console import duration, emit_json, progress, say, show
from mode_gguf_cli.generated import with_recipe
from mode_gguf_cli.memory import memory_json, show_memory

if TYPE_CHECKING:
    from mode_gguf.hub.source import Download
    from mode_gguf.pipeline import ConversionEstimate, ConvertResult

SECTIONS = ("plan", "export", "calibration", "compute", "validation", "checkpoint")


@with_recipe(*SECTIONS, everyday=True)
def command(
    recipe: Recipe,
    model: arguments.OptionalModel = None,
    out: arguments.Out = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the model and the budget, say what would be done, write nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Where settings of calibrate, sensitivity or unit-kl differ from those of the last run in the work "
            "folder, run these and what depends on them again.",
            rich_help_panel=RUN,
        ),
    ] = False,
    json: arguments.Json = False,
) -> None:
    """Calibrate, measure, plan, pack and check MODEL: a GGUF of the size asked for, and its projector.

    Everything lands in one work folder; running the command again goes on where it was cut off and reuses whatever is
    still right, so another budget costs a plan and a packing run only. A model without a family here is converted from
    a GGUF that llama.cpp's converter made (--base-gguf). The recipe that was used is written beside the plan; given
    back with --recipe, it reproduces the run.
    """
    from mode_gguf import pipeline

    if dry_run:
        with pipeline.outlined_model(model, out, recipe) as (run, download):
            _show_estimate(pipeline.estimate_conversion(run, recipe), download, as_json=json)
        return
    run = pipeline.open_model(model, out, recipe, progress())
    result = pipeline.convert(run, recipe, restart=restart)
    if json:
        _emit(result)
    else:
        _show(result, run.folder.path)
    if result.report:
        from mode_gguf.validation.bounds import require_kept
        from mode_gguf.validation.report import ValidationReport

        require_kept(ValidationReport.load(result.report))


def _emit(result: "ConvertResult") -> None:
    emit_json(
        {
            "model": str(result.model),
            "mmproj": str(result.mmproj) if result.mmproj else None,
            "mtp": str(result.mtp) if result.mtp else None,
            "imatrix": str(result.imatrix),
            "plan": str(result.plan),
            "bpw": result.bpw,
            "size_bytes": result.size_bytes,
            "seconds": dict(result.seconds),
        }
    )


def _show(result: "ConvertResult", folder: Path) -> None:
    show(f"model    {result.model}  ({result.bpw:.3f} bpw, {decimal_size(result.size_bytes)})")
    if result.mmproj:
        show(f"mmproj   {result.mmproj}")
    show(f"report   {result.page}")
    say(f"talk to it with: {shell_line(['mode-gguf', 'run', folder])}")
    reused = [stage for stage, seconds in result.seconds.items() if seconds == 0]
    if reused:
        say(f"reused from the last run in this folder: {', '.join(reused)}")


def _show_estimate(estimate: "ConversionEstimate", download: "Download | None", *, as_json: bool) -> None:
    from mode_gguf.estimate.free_resources import disk_use, memory_warning, shortages

    reach, free = estimate.reach, estimate.free
    working, temporary = disk_use(estimate.stages)
    warning = memory_warning(estimate.stages, free)
    problems = [*shortages(estimate.stages, free), *([warning] if warning else [])]
    bpw = 8 * reach.budget / reach.n_weights
    share = estimate.expert_weights / estimate.n_weights
    if as_json:
        emit_json(
            {
                "model": estimate.model_name,
                "family": estimate.family,
                "n_weights": estimate.n_weights,
                "expert_share": share,
                "layers": estimate.layers,
                "experts": estimate.experts,
                "bpw": bpw,
                "reachable_bpw": [reach.lowest_bpw, reach.highest_bpw],
                "limits": list(reach.limits),
                "model_bytes": estimate.model_bytes,
                "stages": [asdict(stage) for stage in estimate.stages],
                "disk_bytes": working,
                "temporary_bytes": temporary,
                "free_disk_bytes": free.disk,
                "free_temporary_bytes": free.disk if free.temporary is None else free.temporary,
                "free_memory_bytes": free.memory,
                "problems": problems,
                "download": asdict(download) if download else None,
                "memory": memory_json(estimate.memory),
            }
        )
        return
    experts = f"{100 * share:.1f} % in {estimate.layers} layers of {estimate.experts} experts"
    show(f"model      {estimate.model_name} ({estimate.family})")
    if download:
        show(f"download   {download}")
    show(f"weights    {estimate.n_weights:,}, {experts}")
    show(f"bpw        {bpw:.4g}; {reach.lowest_bpw:.3f} to {reach.highest_bpw:.3f} can be reached")
    for limit in reach.limits:
        show(f"           {limit}")
    show(f"text file  {decimal_size(estimate.model_bytes)}")
    show_memory(estimate.memory)
    show("")
    rows = [("stage", "about", "memory", "GPU memory", "written")]
    for stage in estimate.stages:
        memory, on_gpu = (binary_size(count) for count in (stage.memory, stage.device_memory))
        written = decimal_size(stage.temporary + stage.working + stage.written)
        rows.append((stage.stage, duration(stage.seconds or 0), memory, on_gpu, written))
    on_device = any(stage.device_memory for stage in estimate.stages)
    for name, *cells in rows:
        show(f"{name:<12}" + "".join(f"{cell:>12}" for column, cell in enumerate(cells) if on_device or column != 2))
    show(f"{'in all':<12}{duration(sum(stage.seconds or 0 for stage in estimate.stages)):>12}")
    show("")
    on_disk, in_temporary, left = map(decimal_size, (working, temporary, free.disk))
    show(f"disk       {on_disk} at one time, {in_temporary} in TMPDIR; {left} free")
    show(f"memory     {binary_size(free.memory)} free")
    for problem in problems:
        show(f"problem    {problem}")
    show("nothing was written")
