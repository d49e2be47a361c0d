"""mode-gguf validate: a finished file in llama.cpp, beside its reference."""

from pathlib import Path
from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show


def command(
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="Text GGUF to check.", show_default=False)],
    reference: Annotated[
        Path | None,
        typer.Option(help="GGUF of the same model in full precision; without it nothing is compared."),
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="Projector of both; without it images are left out.")] = None,
    samples: options.HeldOut = None,
    report: Annotated[
        Path, typer.Option(help="Where the report goes, a JSON file; a page to read is written beside it.")
    ] = Path("report.json"),
    llama_cpp: options.LlamaCpp = None,
    json: options.Json = False,
) -> None:
    """Load CANDIDATE in llama.cpp, let it answer, and measure how far it is from the reference.

    KL divergence over the full vocabulary and top-1 agreement, on text and on answers about pictures; accuracy.
    """
    from mode_gguf import pipeline
    from mode_gguf.errors import UsageError

    if report.suffix == ".html":
        raise UsageError(
            f"--report {report}: names the JSON file; the page is written beside it, give {report.stem}.json"
        )
    result = pipeline.run_validation(
        candidate,
        mmproj,
        reference,
        report,
        held_out=samples,
        llama_cpp=llama_cpp,
        conversion=pipeline.facts_about(candidate),
        progress=progress(),
    )
    page = pipeline.draw_validated(report, result, samples)
    if json:
        emit_json(result.model_dump(mode="json"))
        return
    for name, part in (("text", result.text), ("image", result.image)):
        if part is None:
            continue
        distance = "" if part.kl_mean is None else f", KL {part.kl_mean:.6f} (p99 {part.kl_p99:.6f})"
        agreement = "" if part.top1_agreement is None else f", top-1 {100 * part.top1_agreement:.2f} %"
        show(f"{name:<9} perplexity {part.perplexity:.4f}{distance}{agreement}")
    if "all" in result.accuracy:
        total = result.accuracy["all"]
        interval = f"95 % interval {100 * total.low:.1f} to {100 * total.high:.1f} %"
        show(f"accuracy  {total.right} of {total.asked} = {100 * total.share:.1f} %, {interval}")
    if result.example:
        show(f"example   {result.example.image}: {result.example.question}")
        show(f"          {result.example.answer}")
    show(f"report    {page}")
