"""Calibration of every family: prompts with pictures; counts and sums against those of transformers' whole model."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.calibration.calibrate import calibrate
from tests.families.case.kimi import KIMI_K25
from tests.families.cases import every_case
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.parameters import parameters_by_source

CPU = torch.device("cpu")


@every_case
def test_image_tokens_between_their_marks(case: FamilyCase, families: Families) -> None:
    """Marks are text: the template writes them, and llama.cpp feeds them as text, too."""
    checkpoint = families.checkpoint(case.layouts[0])
    shown = [one for one in families.inputs(case.layouts[0]) if one.has_image]
    tokenizer = families.reference(case).tokenizer
    before, after = (tokenizer.convert_tokens_to_ids(mark) for mark in case.marks)
    assert tuple(int(one.is_vision.sum()) for one in shown) == case.image_tokens
    for one in shown:
        assert torch.equal(one.is_vision, one.input_ids == find_family(checkpoint).vision.image_token(checkpoint))
        places = torch.nonzero(one.is_vision)[:, 0]
        assert (int(one.input_ids[places[0] - 1]), int(one.input_ids[places[-1] + 1])) == (before, after)
        assert (places.diff() == 1).all() or "img_break" in " ".join(case.vision)
        assert one.token_types == ("mm_token_type_ids" if case.token_types else None)


@every_case
def test_counts_by_modality(case: FamilyCase, families: Families) -> None:
    """A fifth of a picture's tokens are key tokens; every token goes to as many experts, and once through the rest."""
    statistics = families.statistics(case)
    shown = statistics.samples
    assert shown.vision_tokens == sum(case.image_tokens)
    key = sum(max(1, int(0.2 * n)) for n in case.image_tokens)
    assert list(statistics.moe_layers) == case.moe_layers
    for tensor in text_tensors(families.checkpoint(case.layouts[0])):
        if tensor.role is Role.DENSE:
            chosen = key if int(tensor.layer or 0) >= case.attention_from else shown.vision_tokens
            counts = statistics.arrays[f"{tensor.activation}.count"][:, 0]
            assert counts.tolist() == [shown.text_tokens, chosen, shown.vision_tokens - chosen], tensor.name
            if tensor.layer in case.moe_layers:
                routed = statistics.counts(int(tensor.layer or 0))
                assert routed.shape[1] == case.pico.EXPERTS
                np.testing.assert_array_equal(routed.sum(axis=1), counts * case.pico.TOP_K)


@every_case
def test_sums_are_those_of_the_whole_model(case: FamilyCase, families: Families) -> None:
    """Of every matrix, from plain module hooks; columns in the order of the GGUF tensor."""
    statistics, checkpoint = families.statistics(case), families.checkpoint(case.layouts[0])
    is_text = ~torch.cat([one.is_vision for one in families.inputs(case.layouts[0])]).numpy()
    dense = [tensor for tensor in text_tensors(checkpoint) if tensor.activation and tensor.role is not Role.EXPERT]
    read, modules = read_by_modules(case, families, dense)
    arrays = statistics.arrays
    kept = {name.rpartition(".")[0] for name in arrays if "ffn_exps" not in name}
    assert kept == {tensor.activation for tensor in dense}, "not of what is stored otherwise than it is applied"
    for tensor in dense:
        expected = read[tensor.name].double().square().numpy()
        if tensor.order is not None and tensor.order.columns is not None:
            expected = expected[:, tensor.order.columns]
        found = arrays[f"{tensor.activation}.sum2"].sum(axis=1)  # by modality: text, key vision, other vision
        for ours, theirs in ((found.sum(axis=0), expected), (found[0], expected[is_text])):
            np.testing.assert_allclose(ours, theirs.sum(axis=0), rtol=case.sums_rtol, atol=1e-6, err_msg=tensor.name)
    for layer, experts in modules.items():
        x, chosen = read["x", layer], read["index", layer]
        counts = statistics.counts(layer)
        for expert in range(case.pico.EXPERTS):
            routed = (chosen == expert).any(-1)
            assert counts[0, expert] == routed.numpy()[is_text].sum()
            assert counts[:, expert].sum() == routed.sum()
            gate, up = linear(x[routed], experts.gate_up_proj[expert]).chunk(2, -1)
            for suffix, values in (("input", x[routed]), ("hidden", case.activation(gate) * up)):
                sum2 = arrays[f"blk.{layer}.ffn_exps.{suffix}.sum2"][:, expert].sum(axis=0)
                expected = values.double().square().sum(0).detach().numpy()
                np.testing.assert_allclose(sum2, expected, rtol=1e-3, atol=1e-6)


def test_counts_of_experts_in_four_bits(families: Families) -> None:
    checkpoint = families.checkpoint("pico_kimi_k25_packed")
    statistics = calibrate(checkpoint, families.samples, device="cpu")
    shown = statistics.samples
    for layer in KIMI_K25.moe_layers:
        counts = statistics.counts(layer)
        assert counts.sum() == KIMI_K25.pico.TOP_K * (shown.text_tokens + shown.vision_tokens)
        assert counts[0].sum() == KIMI_K25.pico.TOP_K * shown.text_tokens
    assert statistics.arrays["blk.0.ffn_down.weight.count"].sum() == shown.text_tokens + shown.vision_tokens


def read_by_modules(
    case: FamilyCase, families: Families, dense: list[SourceTensor]
) -> tuple[dict[Any, Tensor], dict[int, Any]]:
    """What modules of transformers' model read on all samples, and the modules of experts by layer.

    By name of a `dense` tensor (tokens, n_in); of a layer with experts ("x", layer) (tokens, n) that reach them, and
    ("index", layer) (tokens, top-k) choices.
    """
    layout, model = case.layouts[0], families.model(case)
    parameters = parameters_by_source(families.checkpoint(layout), dict(model.named_parameters()))
    parts: dict[Any, list[Tensor]] = defaultdict(list)

    def keep(*names: Any) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Tensor, ...], output: Any) -> None:
            for name, value in zip(names, arguments, strict=False):
                parts[name].append(value.flatten(0, -2))

        return hook

    modules, hooks = {}, []
    for tensor in dense:
        module = model.get_submodule(parameters[tensor.sources[0]].removesuffix(".weight"))
        hooks.append(module.register_forward_hook(keep(tensor.name)))
    for layer in case.moe_layers:
        block = model.get_submodule(f"model.language_model.layers.{layer}")
        modules[layer] = (block.mlp if hasattr(block.mlp, "experts") else block).experts
        hooks.append(modules[layer].register_forward_hook(keep(("x", layer), ("index", layer))))
    with torch.no_grad():
        for one in families.inputs(layout):
            model(**one.model_arguments(CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values) for name, values in parts.items()}, modules
