"""mode-gguf plan: types under a budget."""

from typing import Annotated

import typer

from mode_gguf_cli import options
from mode_gguf_cli.console import emit_json, show


def command(
    model: options.Model,
    bpw: options.Bpw = None,
    size: options.Size = None,
    expert_bpw: options.ExpertBpw = None,
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
    types: options.ExpertTypes = options.DEFAULT_EXPERT_TYPES,
    dense_types: options.DenseTypes = options.DEFAULT_DENSE_TYPES,
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
    pre_tokenizer: options.PreTokenizer = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Choose the types of all tensors under a budget; writes plan.json and tensor-types.txt.

    Needs the results of `sensitivity` in the work folder, except with --uniform. The plan may be edited by hand.
    Weights will be packed as `sensitivity` packed its candidates.
    """
    from mode_gguf import pipeline
    from mode_gguf.errors import UsageError
    from mode_gguf.quantization.libggml import check_available
    from mode_gguf.quantization.packing import DEFAULT_PACKING, Packing
    from mode_gguf.quantization.types import quant_type

    checkpoint, folder = pipeline.open_model(model, out)
    if uniform:
        everywhere = quant_type(uniform)
        check_available([everywhere])
        made = pipeline.make_uniform_plan(
            checkpoint,
            folder,
            everywhere,
            imatrix=imatrix.value if imatrix else None,
            packing=Packing(packing.value) if packing else DEFAULT_PACKING,
        )
        pipeline.save_plan(folder, made)
    elif imatrix or packing:
        option = "--imatrix" if imatrix else "--packing"
        raise UsageError(f"{option} goes with --uniform; otherwise give it to `mode-gguf sensitivity`")
    else:
        candidates = options.candidate_types(types, dense_types)
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
        )
        budget = options.budget_of(bpw, size, expert_bpw)
        made = pipeline.run_plan(checkpoint, folder, budget, chosen, candidates, pre_tokenizer=pre_tokenizer)
    if json:
        emit_json(
            {
                "plan": str(folder.plan),
                "tensor_types": str(folder.tensor_types),
                "bpw": made.bpw,
                "experts_bpw": made.experts_bpw,
                "size_bytes": made.size_bytes,
                "predicted_cost": made.solver.objective if made.solver else None,
                "gap": made.solver.gap if made.solver else None,
            }
        )
        return
    show(f"plan          {folder.plan}")
    show(f"tensor types  {folder.tensor_types}")
    show(f"bpw           {made.bpw:.4f} (experts {made.experts_bpw:.4f})")
    if made.solver:
        show(f"cost          {made.solver.objective:.6g}, proven to {made.solver.gap:.1e}")
    if made.expert_granularity:
        by_expert = made.expert_granularity.record.objective
        show(f"              {by_expert:.6g} if experts of a layer could differ")
