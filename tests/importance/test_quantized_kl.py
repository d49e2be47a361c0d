"""Measured KL of many variants in one pass against one brute-force forward of the whole model for each of them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import UsageError
from mode_gguf.forward.hooks import SampleTrace
from mode_gguf.forward.inputs import ModelInputs, model_inputs
from mode_gguf.forward.modality import KEY_VISION, REDUNDANT_VISION, TEXT, TEXT_ATTENTION
from mode_gguf.forward.recorded_forward import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import StreamedModel, open_streamed
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.quantized_kl import KlSettings, _kl, quantized_kl
from mode_gguf.importance.variants import TypesByTensor, Variant
from mode_gguf.importance.weight_errors import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe
from tests.importance.whole_model import CPU, WholeModel

Q2, Q3, Q4, Q6 = (QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q6_K"))
ROOT = "model.language_model"


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint, samples: list[Sample]) -> list[ModelInputs]:
    return model_inputs(checkpoint, (samples[0], samples[1], samples[4], samples[5]))


@pytest.fixture(scope="module")
def settings(importance: Importance) -> KlSettings:
    return KlSettings(importance, EXACT, TEXT_ATTENTION)


def experts_types(*types: QuantType) -> tuple[QuantType, ...]:
    """One type for all four experts, or four."""
    return types * 4 if len(types) == 1 else types


VARIANTS = (
    Variant("up, all tokens", {"blk.1.ffn_up_exps.weight": experts_types(Q2)}),
    Variant("gate and down", {f"blk.0.ffn_{p}_exps.weight": experts_types(Q2, Q3, Q2, Q4) for p in ("gate", "down")}),
    Variant("down, text", {"blk.1.ffn_down_exps.weight": experts_types(Q2)}, TEXT),
    Variant("down, key", {"blk.1.ffn_down_exps.weight": experts_types(Q2)}, KEY_VISION),
    Variant("gate, redundant", {"blk.1.ffn_gate_exps.weight": experts_types(Q2)}, REDUNDANT_VISION),
    Variant("value", {"blk.1.attn_v.weight": (Q2,)}),
    Variant("key, redundant", {"blk.0.attn_k.weight": (Q2,)}, REDUNDANT_VISION),
    Variant("query, text", {"blk.2.attn_q.weight": (Q2,)}, TEXT),
    Variant("embedding", {"token_embd.weight": (Q2,)}),
    Variant("embedding, text", {"token_embd.weight": (Q2,)}, TEXT),
    Variant("embedding, key", {"token_embd.weight": (Q2,)}, KEY_VISION),
    Variant("head", {"output.weight": (Q2,)}),
    Variant("head, text", {"output.weight": (Q3,)}, TEXT),
    Variant("two layers", {"blk.0.attn_output.weight": (Q2,), "blk.2.ffn_up_exps.weight": experts_types(Q2)}),
    Variant("large type", {"blk.2.attn_output.weight": (Q6,)}),
)

PLAN: TypesByTensor = {
    "token_embd.weight": (Q4,),
    "output.weight": (Q3,),
    "blk.0.attn_k.weight": (Q3,),
    "blk.1.attn_v.weight": (Q3,),
    "blk.1.ffn_down_exps.weight": experts_types(Q3),
    "blk.1.ffn_gate_exps.weight": experts_types(Q2, Q4, Q2, Q3),
    "blk.2.ffn_up_exps.weight": experts_types(Q3),
}
LATE_PLAN: TypesByTensor = {"blk.2.ffn_up_exps.weight": experts_types(Q3)}


class BruteForce(WholeModel):
    """Hugging Face's model with hooks that compute what changed weights give; one forward per sample and question."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, inputs: list[ModelInputs], importance: Importance) -> None:
        super().__init__(folder, inputs)
        self.importance = importance
        self.tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
        self.modality = self._modalities(open_streamed(checkpoint, "cpu"))
        self.reference = self.predictions()

    def _modalities(self, streamed: StreamedModel) -> dict[tuple[str, int], Tensor]:
        """Modality of every token by sample and layer, as the full-precision run sees it."""
        modalities: dict[tuple[str, int], Tensor] = {}

        def leave(trace: SampleTrace, layer: int) -> None:
            modalities[trace.inputs.origin, layer] = trace.modality.clone()

        run_recorded(streamed, self.inputs, LayerConsumer(key_tokens=TEXT_ATTENTION, leave=leave), description="test")
        return modalities

    def divergence(self, base: TypesByTensor, variant: Variant | None) -> np.ndarray:
        """Mean KL per scored position and kind of answer, of the variant or (None) the base."""
        own = {**base, **(variant.types if variant else {})}
        modality = variant.modality if variant else None
        with ExitStack() as stack:
            for name in own:
                stack.enter_context(self._hook(self.tensors[name], base, own, modality))
            return self.divergence_from(self.reference)

    def _hook(self, tensor: SourceTensor, base: TypesByTensor, own: TypesByTensor, modality: int | None) -> Any:
        """Replaces a module's output by what the variant's weights give for tokens of the modality, else the base's."""
        is_expert = tensor.role is Role.EXPERT
        path = f"{ROOT}.layers.{tensor.layer}.mlp.experts" if is_expert else tensor.sources[0].removesuffix(".weight")
        module = self.model.get_submodule(path)

        def output_of(types: TypesByTensor) -> Callable[..., Tensor]:
            if is_expert:
                return self._experts(module, tensor.layer, types)
            weight = self._weights(tensor, module.weight, types)
            if tensor.role is Role.EMBEDDING:
                return lambda ids: weight[ids]
            return lambda x: linear(x, weight)

        of_base, of_own = output_of(base), output_of(own)
        layer = {Role.EMBEDDING: 0, Role.OUTPUT: 2}.get(tensor.role, tensor.layer)

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            found = self.modality[self.running.origin, int(layer or 0)]
            mask = torch.ones(len(found), 1) if modality is None else (found == modality)[:, None]
            return torch.where(mask.bool(), of_own(*arguments), of_base(*arguments))

        return module.register_forward_hook(hook)

    def _weights(self, tensor: SourceTensor, weight: Tensor, types: TypesByTensor, expert: int = 0) -> Tensor:
        if tensor.name not in types:
            return weight
        quant_type = types[tensor.name][expert]
        return weight + change_of_weights(tensor, expert, quant_type, self.importance, EXACT, CPU)

    def _experts(self, module: Any, layer: int | None, types: TypesByTensor) -> Callable[..., Tensor]:
        weights = []
        for expert in range(module.num_experts):
            gate, up = module.gate_up_proj[expert].chunk(2)
            original = {"gate": gate, "up": up, "down": module.down_proj[expert]}
            tensors = {part: self.tensors[f"blk.{layer}.ffn_{part}_exps.weight"] for part in original}
            weights.append({part: self._weights(tensors[part], original[part], types, expert) for part in original})

        def output(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            every = torch.stack([linear(silu(linear(x, w["gate"])) * linear(x, w["up"]), w["down"]) for w in weights])
            chosen = every[index, torch.arange(len(x))[:, None]]
            return (chosen * weight[..., None]).sum(1)

        return output


@pytest.fixture(scope="module")
def brute(checkpoint: Checkpoint, pico_module: Path, inputs: list[ModelInputs], importance: Importance) -> BruteForce:
    return BruteForce(pico_module, checkpoint, inputs, importance)


@pytest.mark.parametrize("base", [{}, PLAN, LATE_PLAN], ids=["full precision", "plan", "plan of the last layer"])
def test_against_brute_force(
    checkpoint: Checkpoint, inputs: list[ModelInputs], settings: KlSettings, brute: BruteForce, base: TypesByTensor
) -> None:
    measured = quantized_kl(open_streamed(checkpoint, "cpu"), inputs, VARIANTS, settings, base=base)
    expected = brute.divergence(base, None)
    assert (expected > 0.001).all() == bool(base)
    np.testing.assert_allclose(measured.base, expected, rtol=2e-3, atol=1e-9)
    assert measured.positions == (
        sum(len(one.scored) for one in inputs[:2]),
        sum(len(one.scored) for one in inputs[2:]),
    )
    for variant, found in zip(VARIANTS, measured.variants, strict=True):
        np.testing.assert_allclose(found, brute.divergence(base, variant), rtol=2e-3, atol=1e-9, err_msg=variant.name)


def test_a_tied_embedding_is_the_head_too(tmp_path: Path, samples: list[Sample], settings: KlSettings) -> None:
    folder = write_pico_qwen3vlmoe(tmp_path / "tied", layout="module", tied=True)
    checkpoint = Checkpoint.open(folder)
    inputs = model_inputs(checkpoint, (samples[0], samples[4]))
    measured = quantized_kl(
        open_streamed(checkpoint, "cpu"), inputs, [Variant("tied", {"token_embd.weight": (Q2,)})], settings
    )
    whole = WholeModel(folder, inputs)
    before = whole.predictions()
    (embedding,) = (t for t in text_tensors(checkpoint) if t.role is Role.EMBEDDING)
    change = change_of_weights(embedding, 0, Q2, settings.importance, EXACT, CPU)
    with torch.no_grad():
        whole.model.get_input_embeddings().weight += change
    np.testing.assert_allclose(measured.variants[0], whole.divergence_from(before), rtol=2e-3)


def test_every_layer_is_loaded_once_and_freed(
    checkpoint: Checkpoint, inputs: list[ModelInputs], settings: KlSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    load = StreamedModel.load_layer

    def counted(self: StreamedModel, index: int) -> None:
        loaded.append(index)
        load(self, index)

    monkeypatch.setattr(StreamedModel, "load_layer", counted)
    streamed = open_streamed(checkpoint, "cpu")
    quantized_kl(streamed, inputs[:1], VARIANTS, settings, base=PLAN)
    assert loaded == [0, 1, 2]
    assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())


def test_neither_files_nor_batches_change_the_result(
    checkpoint: Checkpoint, inputs: list[ModelInputs], settings: KlSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = open_streamed(checkpoint, "cpu")
    whole = quantized_kl(streamed, inputs[1:3], VARIANTS, settings, base=PLAN)
    monkeypatch.setattr("mode_gguf.importance.quantized_kl.TOKENS_PER_CALL", 150)
    monkeypatch.setattr("mode_gguf.importance.quantized_kl.LOGITS_PER_CALL", 2000)
    parts = quantized_kl(streamed, inputs[1:3], VARIANTS, replace(settings, hidden_bytes=1000), base=PLAN)
    np.testing.assert_allclose(parts.variants, whole.variants, rtol=1e-4)
    np.testing.assert_allclose(parts.base, whole.base, rtol=1e-4)


def test_what_changes_nothing_costs_nothing(
    checkpoint: Checkpoint, inputs: list[ModelInputs], settings: KlSettings
) -> None:
    variants = (
        Variant("exact", {"blk.0.attn_q.weight": (QUANT_TYPES["F32"],)}),
        Variant("as the base", {"blk.1.attn_v.weight": PLAN["blk.1.attn_v.weight"]}),
        Variant("no such token", {"blk.1.attn_v.weight": (Q2,)}, KEY_VISION),
    )
    streamed = open_streamed(checkpoint, "cpu")
    alone = quantized_kl(streamed, inputs[:2], variants[::2], settings)
    np.testing.assert_allclose(alone.variants, 0, atol=1e-12)
    assert alone.positions[1] == 0
    on_plan = quantized_kl(streamed, inputs[:2], variants[1:], settings, base=PLAN)
    assert (on_plan.variants == on_plan.base).all()


@pytest.mark.parametrize(
    ("types", "modality", "message"),
    [
        ({"blk.9.attn_q.weight": (Q2,)}, None, "x: types are given for blk.9.attn_q.weight, which this model"),
        ({"blk.0.ffn_up_exps.weight": (Q2,)}, None, "x: 1 types are given for blk.0.ffn_up_exps.weight, 4 expected"),
        ({"blk.0.attn_q.weight": (Q2,)}, 3, "x: modality 3, 0 to 2 expected"),
    ],
)
def test_bad_variants(
    checkpoint: Checkpoint,
    inputs: list[ModelInputs],
    settings: KlSettings,
    types: TypesByTensor,
    modality: int | None,
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        quantized_kl(open_streamed(checkpoint, "cpu"), inputs, [Variant("x", types, modality)], settings)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 200.0])
def test_divergence_of_close_and_of_far_predictions(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(20, 300, generator=generator, dtype=torch.float64)
    moved = logits + size * torch.randn(20, 300, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum())
    assert float(_kl(p.float(), q.float())) == pytest.approx(expected, rel=5e-3)
    assert float(_kl(p.float(), p.float())) == 0
