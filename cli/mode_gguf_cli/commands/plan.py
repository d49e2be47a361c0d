"""mode-gguf plan: types under a budget."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, progress, show
from mode_gguf_cli.memory import memory_json, show_memory

if TYPE_CHECKING:
    from mode_gguf.allocation.granularity import GranularityReport


class Compared(StrEnum):
    """What shares one type, or both ways beside each other."""

    TENSOR = "tensor"
    EXPERT = "expert"
    COMPARE = "compare"


def command(
    model: options.Model,
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
    refine: options.Refine = 0,
    granularity: Annotated[
        Compared,
        typer.Option(help=options.GRANULARITY_HELP + " compare: plan per tensor, and measure what either is worth."),
    ] = Compared.TENSOR,
    measured_samples: options.MeasuredSamples = options.DEFAULT_MEASURED_SAMPLES,
    calibration: options.Calibration = None,
    image_samples: options.ImageSamples = 128,
    text_samples: options.TextSamples = 128,
    device: options.DeviceOption = options.Device.AUTO,
    types: options.MeasuredExpertTypes = None,
    dense_types: options.MeasuredDenseTypes = None,
    floor: options.Floors = None,
    uniform: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Ignore sensitivity and budget: every expert in TYPE, the rest in TYPE but not below Q4_K.",
        ),
    ] = None,
    imatrix: options.ImatrixOption = None,
    packing: Annotated[
        options.PackingMode | None, typer.Option(help="With --uniform: how K-quants are packed; default: refined.")
    ] = None,
    rounding: options.RoundingOption = options.RoundingName.NEAREST,
    pre_tokenizer: options.PreTokenizer = None,
    mmproj_type: Annotated[
        options.ProjectorType, typer.Option(help="With --fit: type that the projector will have.")
    ] = options.ProjectorType.F16,
    seed: options.Seed = 0,
    memory: options.Memory = options.DEFAULT_MEMORY,
    json: options.Json = False,
) -> None:
    """Choose the types of all tensors under a budget; writes plan.json and tensor-types.txt.

    Needs the results of `sensitivity` in the work folder, except with --uniform. The plan may be edited by hand.
    Weights will be packed as `sensitivity` packed its candidates. With --rounding feedback, `round` comes before
    `export`.
    """
    from mode_gguf import pipeline
    from mode_gguf.errors import UsageError
    from mode_gguf.quantization.libggml import check_available
    from mode_gguf.quantization.packing import DEFAULT_PACKING, Packing
    from mode_gguf.quantization.types import quant_type

    checkpoint, folder = pipeline.open_model(model, out, progress())
    if uniform:
        everywhere = quant_type(uniform)
        check_available([everywhere])
        made = pipeline.make_uniform_plan(
            checkpoint,
            folder,
            everywhere,
            imatrix=imatrix.value if imatrix else None,
            packing=Packing(packing.value) if packing else DEFAULT_PACKING,
            rounding=rounding.value,
        )
        with pipeline.folder_lock(folder):
            pipeline.save_plan(folder, made)
    elif imatrix or packing:
        option = "--imatrix" if imatrix else "--packing"
        raise UsageError(f"{option} goes with --uniform; otherwise give it to `mode-gguf sensitivity`")
    else:
        candidates = options.measured_types(folder, types, dense_types, floor or ())
        chosen = options.preset_of(
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
        )
        budget = options.budget_of(
            bpw,
            size,
            expert_bpw,
            options.fit_of(fit, ctx, parallel, kv_type, image_tokens, reserve, mmproj_type),
        )
        samples = options.calibration_options(calibration, image_samples, text_samples, device, seed, memory)
        if refine and granularity is not Compared.TENSOR:
            raise UsageError("--refine improves a type per tensor; leave it out with --granularity " + granularity)
        if granularity is Compared.COMPARE:
            with pipeline.folder_lock(folder):
                report = pipeline.run_granularity(
                    checkpoint,
                    folder,
                    samples,
                    budget,
                    chosen,
                    candidates,
                    sample_budget=measured_samples,
                    pre_tokenizer=pre_tokenizer,
                    progress=progress(),
                )
            _show_granularity(report, folder.granularity, as_json=json)
            return
        if refine:
            with pipeline.folder_lock(folder):
                made = pipeline.run_refined_plan(
                    checkpoint,
                    folder,
                    samples,
                    budget,
                    chosen,
                    candidates,
                    rounds=refine,
                    sample_budget=measured_samples,
                    rounding=rounding.value,
                    pre_tokenizer=pre_tokenizer,
                    progress=progress(),
                )
        else:
            with pipeline.folder_lock(folder):
                made = pipeline.run_plan(
                    checkpoint,
                    folder,
                    budget,
                    chosen,
                    candidates,
                    granularity="expert" if granularity is Compared.EXPERT else "tensor",
                    rounding=rounding.value,
                    pre_tokenizer=pre_tokenizer,
                )
    types_file = None if made.has_expert_groups else folder.tensor_types
    if json:
        emit_json(
            {
                "plan": str(folder.plan),
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
        return
    show(f"plan          {folder.plan}")
    if types_file:
        show(f"tensor types  {types_file}")
    else:
        show("              experts of a layer differ in type: the file will need mode-gguf's build of llama.cpp")
    show(f"bpw           {made.bpw:.4f} (experts {made.experts_bpw:.4f})")
    show_memory(made.memory)
    if made.solver:
        show(f"cost          {made.solver.objective:.6g}, proven to {made.solver.gap:.1e}")
    if made.expert_granularity:
        by_expert = made.expert_granularity.record.objective
        show(f"              {by_expert:.6g} if experts of a layer could differ")
    for trial in made.refinement or ():
        text, image = trial.kl
        verdict = "taken" if trial.accepted else "left"
        show(f"measured      text {text:.5f}, image {image:.5f}, {len(trial.moved)} tensors moved: {verdict}")


def _show_granularity(report: "GranularityReport", path: Path, *, as_json: bool) -> None:
    """Both plans side by side."""
    if as_json:
        emit_json({"report": str(path), **report.model_dump(mode="json")})
        return
    show(f"report        {path}")
    for row in report.rows:
        text, image = row.kl
        show(
            f"type per {row.granularity:<6} {row.size_bytes:>13,} bytes, cost {row.predicted:.5f} predicted; "
            f"KL measured: text {text:.5f}, image {image:.5f}"
        )
