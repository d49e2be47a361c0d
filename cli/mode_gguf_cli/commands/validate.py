"""mode-gguf validate: a finished file in llama.cpp, beside its reference."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mode_gguf.errors import UsageError
from mode_gguf.options import OUTPUT, VALIDATION
from mode_gguf.recipe import Recipe
from mode_gguf_cli import arguments
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.generated import with_recipe

if TYPE_CHECKING:
    from mode_gguf.validation.reference import ModelSource
    from mode_gguf.validation.report import ValidationReport


@with_recipe("validation", "compute.threads")
def command(
    recipe: Recipe,
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="CANDIDATE",
            help="Text GGUF to check, or the http:// address of a llama-server that has it loaded.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="GGUF|FOLDER|URL",
            help="The same model in full precision: a text GGUF, a folder that --reference-data filled earlier, or the "
            "address of a llama-server; without it nothing is compared.",
            show_default=False,
            rich_help_panel=VALIDATION,
        ),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(
            help="Projector of both; without it images are left out.", show_default=False, rich_help_panel=VALIDATION
        ),
    ] = None,
    report: Annotated[
        Path,
        typer.Option(
            help="Where the report goes, a JSON file; a page to read is written beside it.", rich_help_panel=OUTPUT
        ),
    ] = Path("report.json"),
    reference_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the reference's distributions for the next candidate; default: reference/ beside "
            "the report.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: arguments.Json = False,
) -> None:
    """Load CANDIDATE in llama.cpp, let it answer, and measure how far it is from the reference.

    KL divergence over the full vocabulary, top-1 agreement and perplexity, of text and of answers about pictures apart;
    accuracy. A server lists the most likely tokens only: KL is then what it is at least and at most. A reference in the
    work folder that wrote it is first held against what calibration saw of the checkpoint in transformers.
    """
    from mode_gguf import pipeline
    from mode_gguf.validation.bounds import require_kept
    from mode_gguf.validation.validate import ComparedModels

    if report.suffix == ".html":
        raise UsageError(
            f"--report {report}: names the JSON file; the page is written beside it, give {report.stem}.json"
        )
    source, options = _source(candidate), recipe.validation
    compared_with = _source(reference) if reference else None
    probes = pipeline.probes_beside(compared_with) if isinstance(compared_with, Path) else None
    result = pipeline.validate_file(
        ComparedModels(source, compared_with, mmproj, probes=probes),
        report,
        options,
        pipeline.Notes((), pipeline.conversion_of(source) if isinstance(source, Path) else None),
        threads=recipe.compute.threads,
        reference_folder=reference_data or report.parent / "reference",
        progress=progress(),
    )
    page = pipeline.draw_validated(report, result, options)
    if json:
        emit_json(result.model_dump(mode="json"))
    else:
        _show(result, page)
    require_kept(result)


def _source(text: str) -> "ModelSource":
    from mode_gguf.llama_cpp.http_model import ServerUrl

    return ServerUrl(text) if text.startswith(("http://", "https://")) else Path(text)


def _show(result: "ValidationReport", page: Path) -> None:
    if (export := result.transformers) and export.text:
        pictures = f", {export.image.kl_median:.1e} behind a picture" if export.image else ""
        show(
            f"export    as transformers: {export.tokens} tokens equal, median KL {export.text.kl_median:.1e} on text"
            f"{pictures}"
        )
    for name, part in result.divergences.items():
        show(f"{name:<9} perplexity {part.perplexity:.4f} over {part.positions} tokens")
        if part.kl_mean is None:
            continue
        hidden = f" (at most {part.kl_at_most:.6f})" if part.is_bounded else ""
        show(
            f"          KL {part.kl_mean:.6f} ± {part.kl_mean_error:.6f}{hidden}, p99 {part.kl_p99:.6f}, "
            f"p99.9 {part.kl_p99_9:.6f}, top-1 {100 * (part.top1_agreement or 0):.2f} %"
        )
    if "all" in result.accuracy:
        total = result.accuracy["all"]
        interval = f"95 % interval {100 * total.low:.1f} to {100 * total.high:.1f} %"
        show(f"accuracy  {total.right} of {total.asked} = {100 * total.share:.1f} %, {interval}")
    if result.example:
        show(f"example   {result.example.image}: {result.example.question}")
        show(f"          {result.example.answer}")
    for check in result.checks:
        show(f"limit     {check.option} {check.limit:g}: {check.found:.6g}, {'kept' if check.kept else 'broken'}")
    show(f"report    {page}")
