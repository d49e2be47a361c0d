"""mode-gguf convert: all stages."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import duration, emit_json, progress, say, show
from mode_gguf_cli.memory import memory_json, show_memory

if TYPE_CHECKING:
    from mode_gguf.hub.source import Download
    from mode_gguf.pipeline import Estimate


def command(
    model: options.OptionalModel = None,
    bpw: options.Bpw = None,
    size: options.Size = None,
    expert_bpw: options.ExpertBpw = None,
    fit: options.Fit = None,
    ctx: options.Context = None,
    parallel: options.Parallel = None,
    kv_type: options.KvTypeOption = None,
    image_tokens: options.ImageTokens = None,
    reserve: options.Reserve = None,
    out: options.Out = None,
    base_gguf: options.BaseGguf = None,
    base_mmproj: options.BaseMmproj = None,
    calibration: options.Calibration = None,
    calibration_from: options.CalibrationFrom = None,
    device: options.DeviceOption = options.Device.AUTO,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the model and the budget, say what would be done, write nothing.")
    ] = False,
    validate: Annotated[
        bool,
        typer.Option(help="Compare the result with a BF16 file of the same model in llama.cpp; writes that file too."),
    ] = True,
    samples: options.HeldOut = None,
    preset: options.PresetOption = options.PresetName.MODE,
    sensitivity: options.MetricOption = None,
    combine: options.CombineOption = None,
    modality_weights: options.ModalityWeights = None,
    answer_weights: options.AnswerWeights = None,
    pooled: options.Pooled = None,
    frequency_floor: options.FrequencyFloor = None,
    budget_per: options.ScopeOption = None,
    use_all: options.Equality = None,
    dense: options.DenseOption = None,
    unit_kl: options.UnitKlOption = False,
    granularity: Annotated[
        options.GranularityName, typer.Option(help=options.GRANULARITY_HELP)
    ] = options.GranularityName.TENSOR,
    refine: options.Refine = 0,
    measured_samples: options.MeasuredSamples = options.DEFAULT_MEASURED_SAMPLES,
    imatrix: options.ImatrixOption = None,
    packing: options.PackingOption = options.PackingMode.REFINED,
    effort: options.EffortOption = options.Effort.DEFAULT,
    size_power: options.SizePower = options.DEFAULT_SIZE_POWER,
    rounding: Annotated[
        options.RoundingName | None,
        typer.Option(help=options.ROUNDING_HELP + " Default: feedback, unless packing is exact.", show_default=False),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            help=f"Candidate types of expert tensors, comma-separated; default: {options.DEFAULT_EXPERT_TYPES}, with "
            "--granularity expert IQ2_XXS, too.",
            show_default=False,
        ),
    ] = None,
    dense_types: options.DenseTypes = options.DEFAULT_DENSE_TYPES,
    floor: options.Floors = None,
    mmproj_type: options.ProjectorOption = options.ProjectorType.F16,
    shard_size: options.ShardSize = None,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    key_ratio: options.KeyRatio = options.DEFAULT_KEY_RATIO,
    key_tokens: options.KeyTokensOption = options.KeyTokensName.TEXT_ATTENTION,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    threads: options.Threads = None,
    pre_tokenizer: options.PreTokenizer = None,
    llama_cpp: options.LlamaCpp = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Where settings of calibrate, sensitivity or unit-kl differ from those of the last run in the work "
            "folder, run these and what depends on them again.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Calibrate, measure, plan, pack and check MODEL: a GGUF of the size asked for, and its projector.

    Everything lands in one work folder; running the command again goes on where it was cut off and reuses whatever is
    still right, so another budget costs a plan and a packing run only. A model without a family here is converted from
    a GGUF that llama.cpp's converter made (--base-gguf).
    """
    from mode_gguf import pipeline

    chosen = pipeline.ConvertOptions(
        budget=options.budget_of(
            bpw,
            size,
            expert_bpw,
            options.fit_of(fit, ctx, parallel, kv_type, image_tokens, reserve, mmproj_type),
        ),
        calibration=options.calibration_options(
            calibration,
            image_samples,
            text_samples,
            device,
            seed,
            memory,
            key_ratio=key_ratio,
            key_tokens=key_tokens,
            from_imatrix=calibration_from,
        ),
        preset=options.preset_of(
            preset,
            sensitivity,
            combine,
            modality_weights,
            answer_weights,
            pooled,
            frequency_floor,
            budget_per,
            use_all,
            dense,
            seed,
            unit_kl,
        ),
        granularity=granularity.value,
        refine=refine,
        measured_samples=measured_samples,
        imatrix=imatrix.value if imatrix else None,
        packing=options.packing_of(packing, effort, size_power),
        rounding=rounding.value if rounding else None,
        types=options.candidate_types(types or _default_types(granularity), dense_types, floor or ()),
        projector_type=mmproj_type.value,
        pre_tokenizer=pre_tokenizer,
        shard_bytes=options.shard_bytes_of(shard_size),
        threads=threads,
        validate=validate,
        held_out=samples,
        llama_cpp=llama_cpp,
        restart=restart,
    )
    base = options.base_of(base_gguf, base_mmproj, model, calibration_from)
    if dry_run:
        with pipeline.outlined_model(model, out, base) as (checkpoint, folder, download):
            _show_estimate(pipeline.estimate(checkpoint, folder, chosen, measured=True), download, as_json=json)
        return
    checkpoint, folder = pipeline.open_model(model, out, progress(), base)
    result = pipeline.convert(checkpoint, folder, chosen, progress())
    if json:
        emit_json(
            {
                "model": str(result.model),
                "mmproj": str(result.mmproj) if result.mmproj else None,
                "imatrix": str(result.imatrix),
                "plan": str(result.plan),
                "bpw": result.bpw,
                "size_bytes": result.size_bytes,
                "seconds": dict(result.seconds),
            }
        )
        return
    show(f"model    {result.model}  ({result.bpw:.3f} bpw, {result.size_bytes / 1e6:,.1f} MB)")
    if result.mmproj:
        show(f"mmproj   {result.mmproj}")
    show(f"report   {result.page}")
    say(f"talk to it with: mode-gguf run {folder.path}".replace("[", r"\["))
    reused = [stage for stage, seconds in result.seconds.items() if seconds == 0]
    if reused:
        say(f"reused from the last run in this folder: {', '.join(reused)}")


def _default_types(granularity: options.GranularityName) -> str:
    grouped = granularity is options.GranularityName.EXPERT
    return options.DEFAULT_GROUP_TYPES if grouped else options.DEFAULT_EXPERT_TYPES


def _show_estimate(estimate: "Estimate", download: "Download | None", *, as_json: bool) -> None:
    from mode_gguf.estimate.free_resources import disk_use, gigabytes, memory_warning, shortages

    reach, room = estimate.reach, estimate.room
    working, temporary = disk_use(estimate.stages)
    warning = memory_warning(estimate.stages, room)
    problems = [*shortages(estimate.stages, room), *([warning] if warning else [])]
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
                "free_disk_bytes": room.disk,
                "free_temporary_bytes": room.disk if room.temporary is None else room.temporary,
                "free_memory_bytes": room.memory,
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
    show(f"text file  {estimate.model_bytes / 1e6:,.1f} MB")
    show_memory(estimate.memory)
    show("")
    rows = [("stage", "about", "memory", "GPU memory", "written")]
    for stage in estimate.stages:
        memory, on_gpu = (f"{count / 2**30:.1f} GiB" for count in (stage.memory, stage.device_memory))
        written = gigabytes(stage.temporary + stage.working + stage.written)
        rows.append((stage.stage, duration(stage.seconds or 0), memory, on_gpu, written))
    on_device = any(stage.device_memory for stage in estimate.stages)
    for name, *cells in rows:
        show(f"{name:<12}" + "".join(f"{cell:>12}" for column, cell in enumerate(cells) if on_device or column != 2))
    show(f"{'in all':<12}{duration(sum(stage.seconds or 0 for stage in estimate.stages)):>12}")
    show("")
    show(f"disk       {gigabytes(working)} at one time, {gigabytes(temporary)} in TMPDIR; {gigabytes(room.disk)} free")
    show(f"memory     {room.memory / 2**30:.1f} GiB free")
    for problem in problems:
        show(f"problem    {problem}")
    show("nothing was written")
