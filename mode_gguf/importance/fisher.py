"""Fisher sensitivity: the KL divergence that every expert and matrix causes in every candidate type.

MODE's equation 1 is a KL divergence between the model and the model with one expert quantized, which taken literally
needs a forward per layer, expert, type, modality and sample. For small changes KL is quadratic, KL ~ 1/2 d' F d with
the Fisher matrix F = E[g g'], so a few backward passes answer for all of them: draw labels from the model's own
distribution, let g(t) be the gradient of their summed negative log-likelihood at a matrix's (or MoE block's) output for
token t, and d(t) the change of that output when the weights are the packed ones; then

    KL ~ 1 / (2 N) * sum over tokens t of (g(t) . d(t))^2,    N = scored positions,

averaged over the draws. For an expert d is times its routing weight, so frequency is inside the sum. For a whole expert
tensor g . d is summed over a token's experts before it is squared. For other matrices it is summed over all of a
sample's tokens: attention adds up what changes at many tokens (least of all can the value projection do without, whose
cost comes out two to four times too small otherwise). At the output head the expectation over labels is taken exactly:
it is the variance of the change of the logits under the model's distribution.

The forward stores every layer's input; the backward takes the layers in reverse order, recomputes one layer for all
samples, and carries the gradients across it. Additions between layers (DeepStack) pass gradients on unchanged. Every
layer is read twice in all.

Several processes each take their share of the samples. All of the above are sums over samples once N is that of all of
them, so that layer by layer the processes' sums are added; labels are drawn by a sample's number among all.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mode_gguf.architectures.experts import rows_of
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.forward.distributed import gathered_in_order, global_index, sum_over_ranks
from mode_gguf.forward.hidden_store import HiddenStore
from mode_gguf.forward.hooks import LayerRecorder, SampleTrace, recording
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.layerwise import LayerCallbacks, run_layerwise
from mode_gguf.forward.modality import TEXT
from mode_gguf.forward.offload import TensorOffload
from mode_gguf.forward.streaming import StreamedModel
from mode_gguf.importance.fisher_imatrix import ColumnSums, squared_norms
from mode_gguf.importance.group_sums import N_ANSWERS, N_MODALITIES, group_of, group_sums
from mode_gguf.importance.imatrix import Imatrix, Importance, importance_of
from mode_gguf.importance.sensitivity_settings import SensitivityResult, SensitivitySettings
from mode_gguf.importance.token_weights import experts_entry
from mode_gguf.importance.unrouted_experts import fill_unrouted, unrouted_experts
from mode_gguf.importance.weight_errors import expert_changes, matrix_changes, parts_of
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.fallback_types import stored_as

_HEAD = "head"


@dataclass(slots=True)
class _LayerCall:
    """Arguments of one layer's call for one sample; its hidden states are in the store."""

    options: Mapping[str, Any]
    modality: Tensor


@dataclass(slots=True)
class _Sample:
    """One sample: the trace of its forward, and the gradients of its backward."""

    inputs: ModelInputs
    trace: SampleTrace
    layers: list[_LayerCall] = field(default_factory=list)
    last: Tensor | None = None
    head_input: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: list[Tensor] = field(default_factory=list)
    """Gradients per draw (1, S, H), at the output of the layer the backward has reached."""


@dataclass(frozen=True, slots=True)
class _Measurement:
    """A measurement under way: its samples, the store of their hidden states, and the result that it fills.

    `per_position` is one over the scored positions of each answer type, (A, 1).
    """

    streamed: StreamedModel
    samples: Sequence[_Sample]
    settings: SensitivitySettings
    store: HiddenStore
    per_position: np.ndarray
    result: SensitivityResult
    progress: Progress


def fisher_sensitivity(
    streamed: StreamedModel, inputs: Sequence[ModelInputs], settings: SensitivitySettings, progress: Progress = silent
) -> SensitivityResult:
    """Fisher sensitivity of every expert, matrix and the embedding at every candidate type, on all processes' inputs.

    Hidden states of all samples and layers are kept, samples x tokens x layers x H values: what is beyond
    `settings.hidden_bytes` in temporary files.
    """
    positions = np.zeros(N_ANSWERS)
    for one in inputs:
        positions[one.answer] += len(one.scored)
    positions = _over_ranks(positions)
    result = SensitivityResult({}, tuple(int(n) for n in positions), {})
    per_position = 1 / np.maximum(positions, 1)[:, None]
    samples = [_Sample(one, SampleTrace.of(one, streamed.device)) for one in inputs]
    by_role = {role: [tensor for tensor in streamed.tensors if tensor.role is role] for role in Role}
    embedding = by_role[Role.EMBEDDING][0]
    head = (by_role[Role.OUTPUT] or [embedding])[0]
    with HiddenStore(settings.hidden_bytes) as store:
        measurement = _Measurement(streamed, samples, settings, store, per_position, result, progress)
        _forward_all(measurement)
        head_cost = _head_cost(measurement, head) * per_position[..., None]
        _backward_all(measurement)
        embedding_cost = _embedding_cost(measurement, embedding) * per_position[..., None]
    result.arrays[f"{embedding.name}.unit"] = embedding_cost
    # A tied embedding is the head as well: one tensor, both costs.
    result.arrays[f"{head.name}.unit"] = head_cost + (embedding_cost if head is embedding else 0.0)
    return result


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward_all(measurement: _Measurement) -> None:
    """Fill the samples: every layer's call, the head's input, and the gradients at the last layer's output."""
    streamed, samples, settings = measurement.streamed, measurement.samples, measurement.settings
    recorder = LayerRecorder(settings.key_tokens, keep_hidden=False)
    running: list[_Sample] = []

    def enter(number: int) -> None:
        running[:] = [samples[number]]
        recorder.current = samples[number].trace

    def leave(number: int, layer: int) -> None:
        sample = samples[number]
        sample.layers[layer].modality = sample.trace.modality
        if layer == len(streamed.layers) - 1:
            head_input = sample.trace.linears[_HEAD].input.detach()
            sample.head_input = head_input[sample.inputs.scored.to(head_input.device)]
        sample.trace.forget()

    def keep_call(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        sample = running[0]
        sample.layers.append(_LayerCall(options, sample.trace.modality))

    def start_of_gradient(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        # Only what follows the last layer is recorded for autograd; `_gradients` ends its gradient mode.
        last = output.detach().requires_grad_()
        running[0].last = last
        torch.set_grad_enabled(True)
        return last

    last_layer = streamed.layers[len(streamed.layers) - 1]
    head: nn.Module = streamed.model.get_output_embeddings()  # type: ignore[operator]
    with recording(streamed.model, {_HEAD: head}, recorder), ExitStack() as hooks:
        hooks.enter_context(last_layer.register_forward_hook(start_of_gradient))
        # Within `run_layerwise`, a layer's hooks run in the order of their registration: keep the call first.
        for layer in streamed.layers:
            hooks.enter_context(layer.register_forward_pre_hook(keep_call, with_kwargs=True))
        run_layerwise(
            streamed.layers,
            [partial(_gradients, streamed, sample, settings, number) for number, sample in enumerate(samples)],
            LayerCallbacks(load=streamed.load_layer, free=streamed.free_layer, enter=enter, leave=leave),
            offload=TensorOffload(measurement.store, streamed.model, streamed.text_model, keep=True),
            description="sensitivity, forward",
            progress=measurement.progress,
        )


def _gradients(streamed: StreamedModel, sample: _Sample, settings: SensitivitySettings, number: int) -> None:
    """One sample's forward, and the gradients of its drawn labels' negative log-likelihood at the last layer."""
    generator = torch.Generator().manual_seed(settings.request.seed * 1_000_003 + global_index(number))
    logits = streamed.run(sample.inputs).logits
    if sample.last is None:
        raise RuntimeError("the model's forward did not pass its last decoder layer")
    scored = logits[0, sample.inputs.scored.to(logits.device)].float()
    probabilities = scored.detach().softmax(-1).cpu()
    for draw in range(settings.request.label_draws):
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(scored.device)
        with torch.enable_grad():
            loss = cross_entropy(scored, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, sample.last, retain_graph=draw + 1 < settings.request.label_draws)
        sample.gradients.append(gradient.cpu())
    sample.last = None


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward_all(measurement: _Measurement) -> None:
    """Carry the samples' gradients to the embedding, measuring every layer on the way."""
    streamed, samples, settings = measurement.streamed, measurement.samples, measurement.settings
    per_position, result = measurement.per_position, measurement.result
    n_layers = len(streamed.layers)
    linears = streamed.recorded_linears()
    with measurement.progress.step("sensitivity, backward", n_layers * len(samples), "samples", n_layers) as done:
        for index in reversed(range(n_layers)):
            with streamed.loaded_layer(index) as layer:
                measured = [tensor for tensor in streamed.layer_tensors(index, Role.DENSE) if tensor.activation]
                changes = {
                    tensor.name: list(matrix_changes(tensor, settings, settings.importance, result, streamed.device))
                    for tensor in measured
                }
                modules = {tensor.name: linears[str(tensor.activation)] for tensor in measured}
                dense = {name: _no_cost([t for t, _ in fitting], settings) for name, fitting in changes.items()}
                columns = {tensor.name: ColumnSums.of(1, tensor.row_width) for tensor in measured}
                routed: list[_Routed] = []
                weights: dict[str, list[np.ndarray]] = {}
                for number, sample in enumerate(samples):
                    hidden = measurement.store.take((number, index))
                    calls = _backward_layer(streamed, index, layer, modules, sample, hidden)
                    token_scale = _token_scale(calls.group, per_position)
                    if calls.routed is not None:
                        routed.append(calls.routed)
                        weight = squared_norms(calls.routed.gradients) * token_scale
                        weights.setdefault(experts_entry(index), []).append(weight.float().cpu().numpy())
                    for name, (x, gradients) in calls.linears.items():
                        weight = squared_norms(gradients) * token_scale
                        columns[name].add(x, weight)
                        weights.setdefault(name, []).append(weight.float().cpu().numpy())
                        for t, change in changes[name]:
                            dense[name][..., t] += _linear_cost(x, gradients, change, calls.group)
                    done(1)
                for name, cost in sum_over_ranks(dense).items():
                    result.arrays[f"{name}.unit"] = cost * per_position[..., None]
                result.imatrix.update({name: sums.over_ranks().entry() for name, sums in columns.items()})
                result.token_weights.update({name: _of_all_samples(parts) for name, parts in weights.items()})
                if routed:
                    _measure_experts(measurement, index, _concatenated(routed))


@dataclass(frozen=True, slots=True)
class _Routed:
    """Routed tokens: inputs (n, H), index and weight (n, k), group (n,), gradients at the block's output (D, n, H)."""

    inputs: Tensor
    index: Tensor
    weight: Tensor
    group: Tensor
    gradients: Tensor


@dataclass(frozen=True, slots=True)
class _BackwardCalls:
    """One sample's layer: per dense tensor (input (S, n), gradients (D, S, rows)), routed tokens, groups (S,)."""

    linears: dict[str, tuple[Tensor, Tensor]]
    routed: _Routed | None
    group: Tensor


def _backward_layer(
    streamed: StreamedModel,
    index: int,
    layer: nn.Module,
    modules: dict[str, nn.Module],
    sample: _Sample,
    hidden: Tensor,
) -> _BackwardCalls:
    """Recompute one layer for one sample and move the sample's gradients from its output to its input."""
    call = sample.layers[index]
    sample.layers[index] = _LayerCall({}, call.modality)  # its memory is not needed again
    trace = SampleTrace(sample.inputs, call.modality)
    recorder = LayerRecorder(key=None, keep_hidden=False, current=trace)
    hidden = hidden.to(streamed.device).requires_grad_()
    with recording(layer, modules, recorder), torch.enable_grad():
        output = layer(hidden, **call.options)
    outputs = {name: linear.output for name, linear in trace.linears.items()}
    if trace.experts is not None:
        outputs[_EXPERTS] = trace.experts.output
    collected: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for draw, gradient in enumerate(sample.gradients):
        to_input, *found = torch.autograd.grad(
            output,
            [hidden, *outputs.values()],
            gradient.to(streamed.device),
            retain_graph=draw + 1 < len(sample.gradients),
        )
        sample.gradients[draw] = to_input.cpu()
        for name, value in zip(outputs, found, strict=True):
            collected[name].append(value.flatten(0, -2))
    group = group_of(sample.inputs.answer, call.modality)
    experts = trace.experts
    routed = None
    if experts is not None:
        gradients = torch.stack(collected.pop(_EXPERTS))
        routed = _Routed(experts.input.detach(), experts.index, experts.weight.detach(), group, gradients)
    linears = {name: (linear.input.detach(), torch.stack(collected[name])) for name, linear in trace.linears.items()}
    return _BackwardCalls(linears, routed, group)


_EXPERTS = "experts"


def _concatenated(parts: Sequence[_Routed]) -> _Routed:
    return _Routed(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.index for part in parts]),
        torch.cat([part.weight for part in parts]),
        torch.cat([part.group for part in parts]),
        torch.cat([part.gradients for part in parts], dim=1),
    )


# --- costs ------------------------------------------------------------------------------------------------------------


def _half_mean_square(products: Tensor) -> Tensor:
    """Half mean square (g . d)^2 / 2, averaged over draws: (D, n) to (n,)."""
    return products.square().mean(0) / 2


def _over_ranks(array: np.ndarray) -> np.ndarray:
    return sum_over_ranks({"": array})[""]


def _of_all_samples(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenation over all samples, in their order, of arrays for each of this process's."""
    return np.concatenate(gathered_in_order(parts))


def _no_cost(fitting: Sequence[int], settings: SensitivitySettings) -> np.ndarray:
    """Initial costs (A, M, T) of a matrix: zero at the types that fit its rows, NaN at the others."""
    cost = np.full((N_ANSWERS, N_MODALITIES, len(settings.request.dense_types)), np.nan)
    cost[..., list(fitting)] = 0.0
    return cost


def _linear_cost(x: Tensor, gradients: Tensor, change: Tensor, group: Tensor) -> np.ndarray:
    """Summed cost (A, M) of one matrix on one sample."""
    products = (gradients.float() * linear(x.float(), change)).sum(-1)
    return _half_square_of_sums(products, group)


def _half_square_of_sums(products: Tensor, group: Tensor) -> np.ndarray:
    """Half the square of the sum of g . d (D, S) over the tokens of each group, averaged over draws; (A, M)."""
    sums = torch.zeros(len(products), N_ANSWERS * N_MODALITIES, device=products.device).index_add_(1, group, products)
    return _half_mean_square(sums).double().view(N_ANSWERS, N_MODALITIES).cpu().numpy()


def _measure_experts(measurement: _Measurement, layer: int, routed: _Routed) -> None:
    """Arrays and importance of one layer's experts, from the routed tokens of all of this process's samples at once."""
    streamed, settings = measurement.streamed, measurement.settings
    per_position, result = measurement.per_position, measurement.result
    projections = {str(t.projection): t for t in streamed.layer_tensors(layer, Role.EXPERT)}
    module = streamed.experts_module(layer)
    columns = _expert_columns(module, projections, routed, per_position)
    fisher = {projections[projection].name: sums.over_ranks().entry() for projection, sums in columns.items()}
    result.imatrix.update(fisher)
    importance = _chosen_importance(settings, fisher)
    n_experts, n_types = module.num_experts, len(settings.request.expert_types)
    shape = (N_ANSWERS, N_MODALITIES, n_experts, n_types)
    cost = {part: np.full(shape, np.nan) for part in parts_of(projections)}
    error = {part: np.full((n_experts, n_types), np.nan) for part in parts_of(projections)}
    draws, n_tokens = routed.gradients.shape[:2]
    block = {
        part: torch.zeros(n_types, draws, n_tokens, device=streamed.device) for part in projections
    }  # g . d of a token, summed over its experts
    for change in expert_changes(
        streamed,
        module,
        projections,
        settings.request.expert_types,
        importance,
        settings.request.packing,
        routed.inputs,
        routed.index,
    ):
        token, t = change.token, change.type_index
        weight = routed.weight[token, change.slot].float()
        products = (routed.gradients[:, token].float() * change.output).sum(-1) * weight
        cost[change.part][:, :, change.expert, t] = group_sums(_half_mean_square(products), routed.group[token])
        error[change.part][change.expert, t] = change.weight_error
        if change.part in block:
            block[change.part][t][:, token] += products
    counts = _over_ranks(
        np.stack([group_sums((routed.index == expert).any(-1), routed.group) for expert in range(n_experts)], axis=-1)
    )
    for part in parts_of(projections):
        filled = fill_unrouted(_over_ranks(cost[part]), counts, error[part], summed=True)
        name = projections[part].name if part in projections else f"blk.{layer}.ffn_exps"
        result.arrays[f"{name}.expert"] = filled * per_position[..., None, None]
        result.arrays[f"{name}.weight_error"] = error[part]
    for projection, tensor in projections.items():
        unit = _over_ranks(
            np.stack(
                [group_sums(_half_mean_square(block[projection][t]), routed.group) for t in range(n_types)], axis=-1
            )
        )
        unit[..., [stored_as(tensor, quant_type) is None for quant_type in settings.request.expert_types]] = np.nan
        result.arrays[f"{tensor.name}.unit"] = unit * per_position[..., None]
    result.estimated.update(unrouted_experts(layer, counts))


def _expert_columns(
    module: Any, projections: Mapping[str, SourceTensor], routed: _Routed, per_position: np.ndarray
) -> dict[str, ColumnSums]:
    """Weighted sums of squares of one layer's experts, by projection, with the gradients at each one's own output."""
    columns = {name: ColumnSums.of(module.num_experts, tensor.row_width) for name, tensor in projections.items()}
    token_scale = _token_scale(routed.group, per_position)
    for expert in range(module.num_experts):
        token, slot = torch.where(routed.index == expert)
        x, scale = routed.inputs[token], token_scale[token]
        at_down = routed.gradients[:, token].float() * routed.weight[token, slot, None].float()
        before = linear(x, module.gate_up_proj[expert]).float().requires_grad_()
        with torch.enable_grad():
            hidden = module._apply_gate(before)
        at_hidden = at_down @ module.down_proj[expert].float()
        at_gate_up = torch.stack(
            [torch.autograd.grad(hidden, before, gradient, retain_graph=True)[0] for gradient in at_hidden]
        )
        for name, sums in columns.items():
            if name == "down":
                sums.add(hidden.detach(), squared_norms(at_down) * scale, expert)
            else:
                at_rows = at_gate_up[..., rows_of(name, at_gate_up.shape[-1])]
                sums.add(x, squared_norms(at_rows) * scale, expert)
    return columns


def _token_scale(group: Tensor, per_position: np.ndarray) -> Tensor:
    """One over the scored positions of each token's answer type: float64, shaped like `group`."""
    return torch.from_numpy(per_position[:, 0]).to(group.device)[group // N_MODALITIES]


def _chosen_importance(settings: SensitivitySettings, fisher: Imatrix) -> Importance:
    """Importance that candidates are packed with: the plain one, or `fisher` for the tensors it has."""
    return (
        settings.importance if settings.request.imatrix == "plain" else {**settings.importance, **importance_of(fisher)}
    )


def _head_cost(measurement: _Measurement, head: SourceTensor) -> np.ndarray:
    """Summed cost (A, M, T) of the output head: half the variance of its logits' change under the model.

    Its importance goes to `result`. At its output, the squared gradient is on average the sum of p (1 - p) s^2, with s
    the slope of the logit soft cap; without one, s = 1.
    """
    streamed, samples, settings = measurement.streamed, measurement.samples, measurement.settings
    result = measurement.result
    cost = _no_cost([], settings)
    weight: Tensor = streamed.model.get_output_embeddings().weight  # type: ignore[operator]
    if head.activation is not None:  # a tied embedding has no importance
        columns = ColumnSums.of(1, head.row_width)
        weights = []
        for sample in samples:
            probabilities, slope = _predictions(streamed, linear(sample.head_input, weight).float())
            squares = (probabilities * (1 - probabilities) * slope**2).sum(-1)
            token_weight = squares.double() * measurement.per_position[sample.inputs.answer, 0]
            columns.add(sample.head_input, token_weight)
            weights.append(np.zeros(len(sample.inputs.input_ids), np.float32))
            weights[-1][sample.inputs.scored.numpy()] = token_weight.cpu().numpy()
        result.imatrix[head.name] = columns.over_ranks().entry()
        result.token_weights[head.name] = _of_all_samples(weights)
    importance = _chosen_importance(settings, result.imatrix)
    for t, change in matrix_changes(head, settings, importance, result, streamed.device):
        cost[..., t] = 0.0
        for sample in samples:
            probabilities, slope = _predictions(streamed, linear(sample.head_input, weight).float())
            moved = linear(sample.head_input.float(), change) * slope
            mean = (probabilities * moved).sum(-1, keepdim=True)
            variance = (probabilities * (moved - mean).square()).sum(-1)
            scored = sample.inputs.scored.to(streamed.device)
            group = group_of(sample.inputs.answer, sample.layers[-1].modality[scored])
            cost[..., t] += group_sums(variance / 2, group)
    return _over_ranks(cost)


def _predictions(streamed: StreamedModel, head_output: Tensor) -> tuple[Tensor, Tensor | float]:
    """Probabilities, and the derivative of the logits by the head's outputs."""
    logits, cap = streamed.logits_of(head_output), streamed.logit_cap
    return logits.softmax(-1), 1.0 if cap is None else 1 - (logits / cap).square()


def _embedding_cost(measurement: _Measurement, embedding: SourceTensor) -> np.ndarray:
    """Summed cost (A, M, T) of the token embedding: its gradients are those at the first layer's input."""
    streamed, settings = measurement.streamed, measurement.settings
    cost = _no_cost([], settings)
    for t, change in matrix_changes(embedding, settings, settings.importance, measurement.result, streamed.device):
        cost[..., t] = 0.0
        for sample in measurement.samples:
            is_text = ~sample.inputs.is_vision  # placeholders' embeddings are replaced by the image's
            gradients = torch.stack(sample.gradients)[:, 0, is_text].to(streamed.device).float()
            moved = change[sample.inputs.input_ids[is_text].to(streamed.device)]
            products = (gradients * moved).sum(-1) * streamed.embedding_scale
            group = group_of(sample.inputs.answer, torch.full((products.shape[1],), TEXT, device=streamed.device))
            cost[..., t] += _half_square_of_sums(products, group)
    return _over_ranks(cost)
