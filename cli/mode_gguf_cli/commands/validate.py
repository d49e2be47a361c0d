"""mode-gguf validate: a finished file in llama.cpp, beside its reference."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mode_gguf.errors import UsageError
from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show

if TYPE_CHECKING:
    from mode_gguf.llama_cpp.gpu_offload import Offload
    from mode_gguf.validation.reference import Source
    from mode_gguf.validation.report import ValidationReport

_BOUNDS = "Limits: exit code 5 where one is broken"
_PLACE = "Placement on GPUs (in process)"


class SplitModeName(StrEnum):
    """How several GPUs share a model."""

    NONE = "none"
    LAYER = "layer"
    ROW = "row"
    TENSOR = "tensor"


class AnswersName(StrEnum):
    """Which answers about pictures are scored."""

    REFERENCE = "reference"
    GIVEN = "given"


def _limit(help_text: str) -> Any:
    return typer.Option(help=help_text, min=0.0, show_default=False, rich_help_panel=_BOUNDS)


def _share(help_text: str) -> Any:
    return typer.Option(help=help_text, min=0.0, max=1.0, show_default=False, rich_help_panel=_BOUNDS)


def command(
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
        ),
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="Projector of both; without it images are left out.")] = None,
    samples: options.HeldOut = None,
    answers: Annotated[
        AnswersName,
        typer.Option(
            help="Which answers about pictures KL is measured on: the reference's own greedy ones, or the right ones "
            "that questions come with."
        ),
    ] = AnswersName.REFERENCE,
    report: Annotated[
        Path, typer.Option(help="Where the report goes, a JSON file; a page to read is written beside it.")
    ] = Path("report.json"),
    reference_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the reference's distributions for the next candidate; default: reference/ beside "
            "the report.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens that a prompt and its answer may take.", min=16)] = 4096,
    text_tokens: Annotated[int, typer.Option(help="Tokens of each text that are used at most.", min=2)] = 256,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 64,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.", min=1)] = None,
    max_kl: Annotated[float | None, _limit("Mean KL of text, nats per token.")] = None,
    max_kl_p99: Annotated[float | None, _limit("Its 99th percentile.")] = None,
    max_kl_p99_9: Annotated[float | None, _limit("Its 99.9th percentile.")] = None,
    min_top1: Annotated[float | None, _share("Share of text tokens where both models would pick the same.")] = None,
    max_image_kl: Annotated[float | None, _limit("Mean KL of answers about pictures.")] = None,
    max_image_kl_p99: Annotated[float | None, _limit("Its 99th percentile.")] = None,
    max_image_kl_p99_9: Annotated[float | None, _limit("Its 99.9th percentile.")] = None,
    min_image_top1: Annotated[float | None, _share("Share of their tokens where both would pick the same.")] = None,
    min_accuracy: Annotated[float | None, _share("Share of right answers.")] = None,
    n_gpu_layers: Annotated[
        int,
        typer.Option(
            "--n-gpu-layers", "-ngl", help="Layers in GPU memory; -1 means all.", min=-1, rich_help_panel=_PLACE
        ),
    ] = 0,
    split_mode: Annotated[
        SplitModeName, typer.Option(help="How several GPUs share a model.", rich_help_panel=_PLACE)
    ] = SplitModeName.LAYER,
    main_gpu: Annotated[
        int, typer.Option(help="The GPU of split mode none, or for results of row.", min=0, rich_help_panel=_PLACE)
    ] = 0,
    tensor_split: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Share of each GPU, such as 3,1.", show_default=False, rich_help_panel=_PLACE),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A device to use, such as CUDA0; may be repeated. Default: all GPUs.",
            show_default=False,
            rich_help_panel=_PLACE,
        ),
    ] = None,
    override_tensor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=BUFFER",
            help="Where tensors of matching names are stored, such as exps=CPU; may be repeated.",
            show_default=False,
            rich_help_panel=_PLACE,
        ),
    ] = None,
    kv_offload: Annotated[
        bool, typer.Option(help="Whether the KV cache is where its layers are.", rich_help_panel=_PLACE)
    ] = True,
    mmproj_offload: Annotated[
        bool, typer.Option(help="Whether the projector is on the GPU, if layers are.", rich_help_panel=_PLACE)
    ] = True,
    library: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A llama.cpp built with shared libraries to measure in; default: the one in xllamacpp.",
            show_default=False,
        ),
    ] = None,
    top_logprobs: Annotated[
        int,
        typer.Option(help="Tokens that a server lists per position; 0 is all of them, and makes KL exact.", min=0),
    ] = 4096,
    llama_cpp: options.LlamaCpp = None,
    json: options.Json = False,
) -> None:
    """Load CANDIDATE in llama.cpp, let it answer, and measure how far it is from the reference.

    KL divergence over the full vocabulary, top-1 agreement and perplexity, of text and of answers about pictures apart;
    accuracy. A server lists the most likely tokens only: KL is then what it is at least and at most.
    """
    from mode_gguf import pipeline
    from mode_gguf.llama_cpp.engines import named_engine
    from mode_gguf.validation.bounds import Bounds, require_kept
    from mode_gguf.validation.reference import Settings

    settings = Settings(
        context=context,
        threads=threads,
        offload=_offload(
            *(n_gpu_layers, split_mode, main_gpu, tensor_split, device),
            *(override_tensor, kv_offload, mmproj_offload),
        ),
        max_text_tokens=text_tokens,
        max_answer_tokens=answer_tokens,
        answers=answers.value,
        engine=named_engine(library) if library else None,
        top_logprobs=top_logprobs,
    )
    bounds = Bounds(
        max_kl=max_kl,
        max_kl_p99=max_kl_p99,
        max_kl_p99_9=max_kl_p99_9,
        min_top1=min_top1,
        max_image_kl=max_image_kl,
        max_image_kl_p99=max_image_kl_p99,
        max_image_kl_p99_9=max_image_kl_p99_9,
        min_image_top1=min_image_top1,
        min_accuracy=min_accuracy,
    )
    if report.suffix == ".html":
        raise UsageError(
            f"--report {report}: names the JSON file; the page is written beside it, give {report.stem}.json"
        )
    source = _source(candidate)
    result = pipeline.run_validation(
        source,
        mmproj,
        _source(reference) if reference else None,
        report,
        held_out=samples,
        llama_cpp=llama_cpp,
        settings=settings,
        reference_folder=reference_data or report.parent / "reference",
        bounds=bounds,
        conversion=pipeline.conversion_of(source) if isinstance(source, Path) else None,
        progress=progress(),
    )
    page = pipeline.draw_validated(report, result, samples)
    if json:
        emit_json(result.model_dump(mode="json"))
    else:
        _show(result, page)
    require_kept(result)


def _source(text: str) -> "Source":
    from mode_gguf.llama_cpp.http_model import Server

    return Server(text) if text.startswith(("http://", "https://")) else Path(text)


def _offload(
    n_gpu_layers: int,
    split_mode: SplitModeName,
    main_gpu: int,
    tensor_split: str | None,
    device: list[str] | None,
    override_tensor: list[str] | None,
    kv_offload: bool,
    mmproj_offload: bool,
) -> "Offload":
    from mode_gguf.llama_cpp.gpu_offload import Offload

    return Offload(
        n_gpu_layers=n_gpu_layers,
        split_mode=split_mode.value,
        main_gpu=main_gpu,
        tensor_split=_shares(tensor_split) if tensor_split else (),
        devices=tuple(device or ()),
        override_tensors=tuple(map(_override, override_tensor or ())),
        kv_cache=kv_offload,
        projector=mmproj_offload,
    )


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--tensor-split: numbers such as 3,1 expected, {text!r} found") from None
    if not all(0 <= share < float("inf") for share in shares) or not any(shares):
        raise UsageError(f"--tensor-split: shares of 0 or more expected, not all 0, {text!r} found")
    return shares


def _override(text: str) -> tuple[str, str]:
    pattern, _, buffer = text.rpartition("=")
    if not pattern or not buffer:
        raise UsageError(f"--override-tensor: REGEX=BUFFER expected, such as exps=CPU, {text!r} found")
    return pattern, buffer


def _show(result: "ValidationReport", page: Path) -> None:
    for name, part in (("text", result.text), ("image", result.image)):
        if part is None:
            continue
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
