"""KL divergences of quantized models from the full-precision one, measured: many variants in one pass over the layers.

Every sample runs through the full-precision model, layer by layer. While a layer is loaded, the base (a whole plan, or
nothing) and the variants (each a base with a few tensors in other types) run through it, too, as rows of one batch. A
variant is the base up to the first layer where it differs, so it joins there: it costs a forward of the layers from
there on, and all variants share what reads and packs weights. Routers are free: a changed hidden state may choose other
experts, which no derivative sees.

What happens between layers (DeepStack adds an image's features) is a constant of the sample: the full-precision input
of a layer less the output of the one before. Masks and rotary positions are those of the full-precision calls, and so
is which tokens are key.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.forward.hidden_store import HiddenStore
from mode_gguf.forward.hooks import LayerRecorder, SampleTrace, recording
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.layerwise import LayerCallbacks, run_layerwise
from mode_gguf.forward.modality import TEXT, KeyTokens
from mode_gguf.forward.streaming import FINAL_NORM, StreamedModel
from mode_gguf.importance.group_sums import N_ANSWERS
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.quantized_layer import QuantizedLayer, VariantRow
from mode_gguf.importance.variants import TypeChanges, TypesByTensor, Variant, check_types, type_changes
from mode_gguf.options import ComputeOptions, Packing
from mode_gguf.progress import Progress, silent

TOKENS_PER_CALL = 1 << 13
"""Maximum of rows times tokens that run through a layer at once."""

LOGITS_PER_CALL = 1 << 24
"""Maximum of positions times vocabulary compared at once: 64 MiB of float32."""

_BASE = -1
"""Index of the base among the variants' indices."""


@dataclass(frozen=True, slots=True)
class QuantizedKl:
    """Mean KL(full precision || quantized) in nats per scored position, by answer type; 0 for one without samples.

    Attributes:
        base: float64 (A,).
        variants: float64 (V, A).
        positions: scored positions, (A,).
    """

    base: np.ndarray
    variants: np.ndarray
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KlSettings:
    """Settings of a KL measurement.

    Attributes:
        importance: what weights are packed with; a tensor without is packed plainly. packing: how.
        key_tokens: which vision tokens are key.
        hidden_bytes: of hidden states that are kept in memory, the rest goes to temporary files.
    """

    importance: Importance
    packing: Packing
    key_tokens: KeyTokens
    hidden_bytes: int = ComputeOptions.hidden_memory


@dataclass(slots=True)
class _Sample:
    """One sample: its full-precision forward, and the quantized models that run beside it.

    `calls` are of the layer that is loaded and of the next one: inputs (1, S, H) and options. `members` are the base
    and the variants whose hidden states differ from the full-precision ones; the store has them in this order.
    """

    inputs: ModelInputs
    trace: SampleTrace
    calls: list[tuple[Tensor, Mapping[str, Any]]] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    members: list[int] = field(default_factory=list)


def quantized_kl(
    streamed: StreamedModel,
    inputs: Sequence[ModelInputs],
    variants: Sequence[Variant],
    settings: KlSettings,
    *,
    base: TypesByTensor | None = None,
    description: str = "measuring KL",
    progress: Progress = silent,
) -> QuantizedKl:
    """Measure the base and all variants; every layer is loaded once.

    Memory beside the layer: its matrices in all types asked for (float32), and the hidden states of `settings`.

    Args:
        streamed: in float32; bfloat16 would add noise as large as what a large type does.
        base: types that the variants start from; tensors that are not named keep full precision.

    Raises:
        UsageError: types for tensors that are not there, or not one per expert.
    """
    check_types(streamed.tensors, base or {}, variants)
    with HiddenStore(settings.hidden_bytes) as store, torch.no_grad():
        return _Measurement(streamed, inputs, variants, settings, base or {}, store).run(description, progress)


class _Measurement:
    def __init__(
        self,
        streamed: StreamedModel,
        inputs: Sequence[ModelInputs],
        variants: Sequence[Variant],
        settings: KlSettings,
        base: TypesByTensor,
        store: HiddenStore,
    ) -> None:
        self.streamed, self.variants, self.settings, self.base, self.store = streamed, variants, settings, base, store
        self.samples = [_Sample(one, SampleTrace.of(one, streamed.device)) for one in inputs]
        by_role = {tensor.role: tensor for tensor in streamed.tensors}
        self.embedding: SourceTensor = by_role[Role.EMBEDDING]
        self.head: SourceTensor = by_role.get(Role.OUTPUT, self.embedding)

    def run(self, description: str, progress: Progress) -> QuantizedKl:
        streamed, samples = self.streamed, self.samples
        recorder = LayerRecorder(self.settings.key_tokens, keep_hidden=False)
        running: list[_Sample] = []

        def enter(number: int) -> None:
            running[:] = [samples[number]]
            recorder.current = samples[number].trace

        def leave(number: int, layer: int) -> None:
            samples[number].trace.forget()

        def free(index: int) -> None:
            recorder.current = None
            if index == 0:
                self._enter_layers()
            self._run_layer(index)
            streamed.free_layer(index)

        def keep_call(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            running[0].calls.append((arguments[0], options))

        def keep_output(module: nn.Module, arguments: object, output: Tensor) -> None:
            running[0].output = output

        with recording(streamed.model, {}, recorder), ExitStack() as hooks:
            # Within `run_layerwise`, a layer's hooks run in the order of their registration: keep the call first.
            for layer in streamed.layers:
                hooks.enter_context(layer.register_forward_pre_hook(keep_call, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(keep_output))
            run_layerwise(
                streamed.layers,
                [partial(streamed.run, sample.inputs, logits_to_keep=1) for sample in samples],
                LayerCallbacks(load=streamed.load_layer, free=free, enter=enter, leave=leave),
                tokens=[len(sample.inputs.input_ids) for sample in samples],
                description=description,
                progress=progress,
            )
        return self._divergences()

    def _changes(self, tensors: Sequence[SourceTensor]) -> TypeChanges:
        return type_changes(
            tensors, self.base, self.variants, self.settings.importance, self.settings.packing, self.streamed.device
        )

    def _enter_layers(self) -> None:
        """Start the base and the variants whose token embedding differs."""
        changes = self._changes([self.embedding])
        name, in_base = self.embedding.name, changes.base.get((self.embedding.name, 0))
        scale = self.streamed.embedding_scale
        for number, sample in enumerate(self.samples):
            hidden = sample.calls[0][0][0]
            ids = sample.inputs.input_ids.to(hidden.device)
            text = ~sample.inputs.is_vision.to(hidden.device)[:, None]  # placeholders' embeddings are replaced
            rows = []
            if in_base is not None:
                hidden = hidden + (scale * in_base[ids] * text).to(hidden.dtype)
                sample.members.append(_BASE)
                rows.append(hidden)
            for v, variant in enumerate(self.variants):
                change = changes.of(variant, name)
                if change is not None and variant.modality in (None, TEXT):
                    sample.members.append(v)
                    rows.append(hidden + (scale * change[ids] * text).to(hidden.dtype))
            if rows:
                self.store.put(number, torch.stack(rows))

    def _run_layer(self, index: int) -> None:
        """Run base and variants through the loaded layer, after all full-precision forwards."""
        streamed = self.streamed
        changes = self._changes([t for t in streamed.tensors if t.layer == index and t.is_measured])
        layer = QuantizedLayer(streamed, index, changes)
        affected = [changes.affects(variant) for variant in self.variants]
        for number, sample in enumerate(self.samples):
            hidden, options = sample.calls.pop(0)
            masks = [_mask(variant, sample.trace.modality) for variant in self.variants]
            effective = [there and bool(mask.any()) for there, mask in zip(affected, masks, strict=True)]
            states = self._join(number, hidden, bool(changes.base), effective)
            if not sample.members:
                continue
            between_layers = sample.calls[0][0] - sample.output if sample.calls else 0.0
            rows = [
                VariantRow(self.variants[v], masks[v]) if v != _BASE and effective[v] else None for v in sample.members
            ]
            step = max(1, TOKENS_PER_CALL // hidden.shape[1])
            outputs = torch.empty_like(states)
            for start in range(0, len(rows), step):
                part = states[start : start + step].to(streamed.device)
                outputs[start : start + step] = layer(part, options, rows[start : start + step]) + between_layers
            self.store.put(number, outputs)

    def _join(self, number: int, hidden: Tensor, base_differs: bool, effective: Sequence[bool]) -> Tensor:
        """Hidden states (R, S, H) at the layer's input, with those that join here; on the CPU."""
        members = self.samples[number].members
        hidden = hidden.cpu()
        states = self.store.take(number) if members else hidden[:0]
        if base_differs and _BASE not in members:
            members.append(_BASE)
            states = torch.cat([states, hidden])
        joining = [v for v, there in enumerate(effective) if there and v not in members]
        if joining:
            start = states[members.index(_BASE)] if _BASE in members else hidden[0]
            members += joining
            states = torch.cat([states, start.expand(len(joining), -1, -1)])
        return states

    def _divergences(self) -> QuantizedKl:
        """KL divergences at the scored positions, after the final norm and the output head."""
        changes = self._changes([self.head])
        weight = self.streamed.model.get_output_embeddings().weight.float()  # type: ignore[operator]
        base, variants = np.zeros(N_ANSWERS), np.zeros((len(self.variants), N_ANSWERS))
        positions = np.zeros(N_ANSWERS, np.int64)
        for number, sample in enumerate(self.samples):
            answer = sample.inputs.answer
            of_base, of_variants = self._sample_divergences(number, weight, changes)
            base[answer] += of_base
            variants[:, answer] += of_variants
            positions[answer] += len(sample.inputs.scored)
        per_position = 1 / np.maximum(positions, 1)
        return QuantizedKl(base * per_position, variants * per_position, tuple(int(n) for n in positions))

    def _sample_divergences(self, number: int, weight: Tensor, changes: TypeChanges) -> tuple[float, list[float]]:
        """Summed KL of the base and of every variant on one sample, with the head's weight and its changes."""
        sample, device = self.samples[number], self.streamed.device
        norm = self.streamed.model.get_submodule(FINAL_NORM)
        scored = sample.inputs.scored
        in_base = changes.base.get((self.head.name, 0))
        base_weight = weight if in_base is None else weight + in_base
        full = norm(sample.output[0, scored.to(device)]).float()
        states = self.store.take(number)[:, scored] if sample.members else ()
        head_inputs = dict(zip(sample.members, states, strict=True))

        def divergence(of: int, change: Tensor | None = None, mask: Tensor | None = None) -> float:
            own = head_inputs.get(of, head_inputs.get(_BASE))
            x = full if own is None else norm(own.to(device)).float()
            return _divergence(self.streamed.logits_of, full, weight, base_weight, x, change, mask)

        of_base = divergence(_BASE) if _BASE in head_inputs or in_base is not None else 0.0
        of_variants = []
        for v, variant in enumerate(self.variants):
            change = changes.of(variant, self.head.name)
            mask = _mask(variant, sample.trace.modality[scored.to(device)])
            differs = v in head_inputs or (change is not None and bool(mask.any()))
            of_variants.append(divergence(v, change, mask) if differs else of_base)
        return of_base, of_variants


def _mask(variant: Variant, modality: Tensor) -> Tensor:
    """Mask of the tokens that pass through the variant's weights, bool (S,)."""
    return torch.ones_like(modality, dtype=torch.bool) if variant.modality is None else modality == variant.modality


def _divergence(
    logits_of: Callable[[Tensor], Tensor],
    full: Tensor,
    full_weight: Tensor,
    base_weight: Tensor,
    x: Tensor,
    change: Tensor | None = None,
    mask: Tensor | None = None,
) -> float:
    """Summed KL of the predictions from head inputs `full` (n, H) to those from `x` (n, H).

    `change` is added to the base's head for positions in `mask`; `logits_of` makes logits of a head's outputs.
    """
    total = 0.0
    step = max(1, LOGITS_PER_CALL // len(full_weight))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        logits = linear(x[part], base_weight)
        if change is not None and mask is not None:
            logits[mask[part]] += linear(x[part][mask[part]], change)
        expected = logits_of(linear(full[part], full_weight)).log_softmax(-1)
        total += float(_kl(expected, logits_of(logits).log_softmax(-1)))
    return total


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Summed KL(p || q) over positions, from log-probabilities (n, vocabulary).

    As sum of p (e^d - 1 - d), d = log q - log p, which adds sum of q - p = 0: no term is negative, so that a KL far
    below float32's resolution of the logarithms still comes out right.
    """
    p, d = log_p.exp(), log_q - log_p
    near = p * (torch.expm1(d.clamp(max=1)) - d)
    far = log_q.exp() - p - p * d  # where e^d might overflow
    return torch.where(d < 1, near, far).sum(dtype=torch.float64)
