"""Recording hooks of a decoder layer: its routed experts, its linear layers, and its key vision tokens.

Fused experts have no module per expert and attention weights are not returned by fast attention, so two functions are
registered with transformers, which a model selects by name. They compute what the originals do and leave a record with
the `LayerRecorder` of the model they belong to.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.key_tokens import LayerAttention, key_vision_tokens
from mode_gguf.forward.modality import KEY_VISION, REDUNDANT_VISION, TEXT, KeyTokens

EXPERTS = "mode_gguf"
ATTENTION = "mode_gguf"


@dataclass(frozen=True, slots=True)
class LinearCall:
    """A linear layer's input (S, n_in), and its output (..., rows), the tensor that the model goes on with."""

    input: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """The routed experts of one layer on one sample.

    Attributes:
        input: (S, H).
        index: (S, k) chosen experts.
        weight: (S, k) routing weights.
        output: (S, H) weighted sum of the chosen experts' outputs.
        hidden: per expert with tokens: (expert, (n,) its tokens, (n, I) gated activation); empty unless asked for.
    """

    input: Tensor
    index: Tensor
    weight: Tensor
    output: Tensor
    hidden: Sequence[tuple[int, Tensor, Tensor]]


@dataclass(slots=True)
class SampleTrace:
    """The trace of one sample's forward; `linears` and `experts` are records of the layer it last went through."""

    inputs: ModelInputs
    modality: Tensor
    """(S,) int64 modality of every token, as the last layer with attention has chosen it: layers without (linear
    attention has no weights to choose by) keep that choice. Until a layer has attended, every vision token is key."""
    linears: dict[str, LinearCall] = field(default_factory=dict)
    experts: ExpertsCall | None = None

    @classmethod
    def of(cls, inputs: ModelInputs, device: torch.device) -> "SampleTrace":
        return cls(inputs, torch.where(inputs.is_vision.to(device), KEY_VISION, TEXT))

    def forget(self) -> None:
        """Drop the records of the layer just passed."""
        self.linears.clear()
        self.experts = None


@dataclass(slots=True)
class LayerRecorder:
    """The recorder of a model: settings, and the trace of the sample that runs through it at the moment.

    Attributes:
        key: how key tokens are chosen; None leaves the modalities of the trace as they are.
        keep_hidden: whether the experts' gated activations are recorded.
    """

    key: KeyTokens | None
    keep_hidden: bool
    current: SampleTrace | None = None


_RECORDERS: WeakKeyDictionary[nn.Module, LayerRecorder] = WeakKeyDictionary()


@contextmanager
def recording(model: nn.Module, linears: dict[str, nn.Module], recorder: LayerRecorder) -> Iterator[LayerRecorder]:
    """Record into `recorder.current` the experts of `model` and the named linear layers, while the context lasts."""

    def record(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if recorder.current is not None:
                recorder.current.linears[name] = LinearCall(arguments[0].flatten(0, -2), output)

        return hook

    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.enter_context(module.register_forward_hook(record(name)))
        for module in model.modules():
            _RECORDERS[module] = recorder
            hooks.callback(_RECORDERS.pop, module, None)
        yield recorder


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface: self has gate_up_proj (E, 2I, H), down_proj (E, H, I) and `_apply_gate`."""
    recorder = _RECORDERS.get(self)
    keep = recorder is not None and recorder.keep_hidden
    output = torch.zeros_like(hidden_states)
    kept = []
    for expert in torch.unique(top_k_index).tolist():
        token, slot = torch.where(top_k_index == expert)
        hidden = self._apply_gate(linear(hidden_states[token], self.gate_up_proj[expert]))
        routed = linear(hidden, self.down_proj[expert]) * top_k_weights[token, slot, None]
        output.index_add_(0, token, routed.to(output.dtype))
        if keep:
            kept.append((expert, token, hidden))
    if recorder is not None and recorder.current is not None:
        recorder.current.experts = ExpertsCall(hidden_states, top_k_index, top_k_weights, output, kept)
    return output


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: scaled dot-product attention, plus the choice of this layer's key tokens."""
    recorder = _RECORDERS.get(module)
    if recorder is not None and recorder.current is not None and recorder.key is not None:
        inputs = recorder.current.inputs
        if inputs.is_vision.any():
            with torch.no_grad():
                layer = LayerAttention(query[0], key[0], value[0], attention_mask, options["scaling"])
                key_tokens = key_vision_tokens(recorder.key, inputs, module.layer_idx, layer)
            modality = torch.where(inputs.is_vision.to(query.device), REDUNDANT_VISION, TEXT)
            modality[key_tokens] = KEY_VISION
            recorder.current.modality = modality
    attended: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return attended


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
