"""The Fisher importance matrix against gradients taken token by token on the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForImageTextToText

from mode_gguf.allocation.presets import PRESETS
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import read_imatrix, write_imatrix
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.fisher_imatrix import PRIOR_TOKENS, ColumnSums
from mode_gguf.importance.imatrix import Importance, importance_of
from mode_gguf.importance.sensitivity_settings import SensitivityRequest, SensitivityResult, SensitivitySettings
from mode_gguf.importance.token_weights import experts_entry
from mode_gguf.quantization.types import QUANT_TYPES

CPU = torch.device("cpu")
TYPES = (QUANT_TYPES["Q2_K"],)
DRAWS, SEED, LAYER = 2, 3, 1


def measure(
    checkpoint: Checkpoint, inputs: list[ModelInputs], importance: Importance, **options: Any
) -> SensitivityResult:
    request = SensitivityRequest(TYPES, TYPES, label_draws=DRAWS, seed=SEED, **options)
    settings = SensitivitySettings(request, importance, TEXT_ATTENTION)
    return fisher_sensitivity(open_streamed(checkpoint, "cpu"), inputs, settings)


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint, inputs: list[ModelInputs], importance: Importance) -> SensitivityResult:
    return measure(checkpoint, inputs, importance, imatrix="fisher")


class BruteForce:
    """Sums of squared inputs of layer 1, weighed token by token with gradients of Hugging Face's own model."""

    def __init__(self, folder: Path, inputs: list[ModelInputs]) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        layer = self.model.model.language_model.layers[LAYER]
        self.experts, self.value, self.head = layer.mlp.experts, layer.self_attn.v_proj, self.model.lm_head
        self.calls: dict[nn.Module, tuple[tuple[Tensor, ...], Tensor]] = {}
        for module in (self.experts, self.value, self.head):
            module.register_forward_hook(self._keep)
        self.positions = [sum(len(one.scored) for one in inputs if one.answer == answer) for answer in (0, 1)]
        self.weighed: dict[str, list[tuple[int, float, Tensor]]] = {}
        """By matrix: expert, weight and input of every token."""
        self.routing: list[Tensor] = []
        for number, one in enumerate(inputs):
            self._run(number, one)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls[module] = arguments, output

    def _run(self, number: int, one: ModelInputs) -> None:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + number)
        logits = self.model(**one.model_arguments(CPU, torch.float32)).logits[0, one.scored]
        scale = 1 / self.positions[one.answer]
        (values_in,), values_out = self.calls[self.value]
        arguments, routed_out = self.calls[self.experts]
        x, index, weight = (argument.detach() for argument in arguments)
        self.routing.append(weight)
        gradients = []
        for _ in range(DRAWS):
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = cross_entropy(logits, labels, reduction="sum")
            gradients.append(torch.autograd.grad(loss, [values_out, routed_out], retain_graph=True))
        for token in range(len(x)):
            norms = [float(at_value[0, token].square().sum()) for at_value, _ in gradients]
            self._add("value", 0, scale * float(np.mean(norms)), values_in[0, token])
            at_block = [block.reshape(x.shape)[token] for _, block in gradients]
            for expert, share in zip(index[token].tolist(), weight[token], strict=True):
                self._add_expert(expert, scale, x[token], [share * gradient for gradient in at_block])
        (head_in,), _ = self.calls[self.head]
        for row, token in zip(logits.detach().softmax(-1), one.scored, strict=True):
            errors = row[None] - torch.eye(len(row))  # the logits' gradient, for every label that could be drawn
            self._add("head", 0, scale * float(row @ errors.square().sum(-1)), head_in[0, token])

    def _add_expert(self, expert: int, scale: float, x: Tensor, at_down: list[Tensor]) -> None:
        gate, up = (part.detach() @ x for part in self.experts.gate_up_proj[expert].chunk(2))
        leaves = [gate.requires_grad_(), up.requires_grad_()]
        hidden = silu(gate) * up
        output = self.experts.down_proj[expert].detach() @ hidden
        found = [torch.autograd.grad(output, leaves, gradient, retain_graph=True) for gradient in at_down]
        for name, norms, inputs in (
            ("gate", [float(g.square().sum()) for g, _ in found], x),
            ("up", [float(u.square().sum()) for _, u in found], x),
            ("down", [float(g.square().sum()) for g in at_down], hidden.detach()),
        ):
            self._add(name, expert, scale * float(np.mean(norms)), inputs)

    def _add(self, name: str, expert: int, weight: float, x: Tensor) -> None:
        self.weighed.setdefault(name, []).append((expert, weight, x.detach()))

    def importance(self, name: str, n_experts: int) -> np.ndarray:
        """(E, n), by the definition: shares of the sums, mixed with the layer's by effective tokens."""
        tokens = self.weighed[name]
        layer = torch.stack([w * x.double().square() for _, w, x in tokens]).sum(0)
        rows = []
        for expert in range(n_experts):
            weights = np.array([w for e, w, _ in tokens if e == expert])
            own = torch.stack([w * x.double().square() for e, w, x in tokens if e == expert]).sum(0)
            effective = weights.sum() ** 2 / (weights**2).sum()
            trust = effective / (effective + PRIOR_TOKENS) if n_experts > 1 else 1
            rows.append(trust * own / own.mean() + (1 - trust) * layer / layer.mean())
        return torch.stack(rows).numpy()


@pytest.fixture(scope="module")
def brute_force(pico_module: Path, inputs: list[ModelInputs]) -> BruteForce:
    return BruteForce(pico_module, inputs)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("gate", f"blk.{LAYER}.ffn_gate_exps.weight"),
        ("up", f"blk.{LAYER}.ffn_up_exps.weight"),
        ("down", f"blk.{LAYER}.ffn_down_exps.weight"),
        ("value", f"blk.{LAYER}.attn_v.weight"),
        ("head", "output.weight"),
    ],
)
def test_columns_are_weighed_by_squared_gradients(
    measured: SensitivityResult, brute_force: BruteForce, name: str, matrix: str
) -> None:
    found = importance_of(measured.imatrix)[matrix]
    np.testing.assert_allclose(found, brute_force.importance(name, len(found)), rtol=1e-3)


def test_tokens_weigh_what_they_weighed_in_the_sums(
    measured: SensitivityResult, brute_force: BruteForce, inputs: list[ModelInputs]
) -> None:
    """Dense matrices token by token; of experts at the block's output, which a token's experts share by routing."""
    n_tokens = sum(len(one.input_ids) for one in inputs)
    expected = [weight for _, weight, _ in brute_force.weighed["value"]]
    np.testing.assert_allclose(measured.token_weights[f"blk.{LAYER}.attn_v.weight"], expected, rtol=1e-3)
    head = measured.token_weights["output.weight"]
    assert head.shape == (n_tokens,)
    expected = [weight for _, weight, _ in brute_force.weighed["head"]]
    np.testing.assert_allclose(head[head > 0], expected, rtol=1e-3)
    at_down = np.array([weight for _, weight, _ in brute_force.weighed["down"]]).reshape(n_tokens, -1)
    routing = torch.cat(brute_force.routing).numpy() ** 2
    at_block = measured.token_weights[experts_entry(LAYER)]
    np.testing.assert_allclose(at_block[:, None] * routing, at_down, rtol=1e-3)


def test_every_tensor_of_the_plain_matrix_has_an_entry(measured: SensitivityResult, importance: Importance) -> None:
    found = importance_of(measured.imatrix)
    assert {name: values.shape for name, values in found.items()} == {
        name: values.shape for name, values in importance.items()
    }
    for name, values in found.items():
        np.testing.assert_allclose(values.mean(axis=1), 1, rtol=1e-5, err_msg=name)


def test_the_file_gives_back_the_same_importance(measured: SensitivityResult, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "imatrix.gguf", measured.imatrix, ["tests"], chunk_count=2, chunk_size=64)
    read = read_imatrix(tmp_path / "imatrix.gguf")
    expected = importance_of(measured.imatrix)
    assert set(read) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values)


def test_experts_and_head_are_measured_as_they_will_be_packed(
    checkpoint: Checkpoint, inputs: list[ModelInputs], importance: Importance, measured: SensitivityResult
) -> None:
    """The same arrays as with the finished matrix in the plain one's place; attention stays with the plain one."""
    attention = {tensor.name for tensor in text_tensors(checkpoint) if tensor.role is Role.DENSE}
    finished = {name: values for name, values in importance_of(measured.imatrix).items() if name not in attention}
    again = measure(checkpoint, inputs, {**importance, **finished})
    plain = measure(checkpoint, inputs, importance)
    for name, array in measured.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    down = f"blk.{LAYER}.ffn_down_exps.weight.unit"
    assert not np.array_equal(measured.arrays[down], plain.arrays[down])
    for name, (sums, counts) in measured.imatrix.items():
        np.testing.assert_array_equal(sums, plain.imatrix[name][0])
        np.testing.assert_array_equal(counts, plain.imatrix[name][1])


def test_planning_and_packing_pursue_the_same_objective() -> None:
    """The matrix adds answers and modalities up as they come; so must the costs of the preset that goes with it."""
    costs = PRESETS["mode"].costs
    assert {*costs.answer_weights, *costs.modality_weights} == {1.0}
    assert costs.combination == "sensitivity"


def sums_of(tokens: list[list[tuple[float, list[float]]]]) -> ColumnSums:
    """Sums of weight and input of every token of every expert."""
    sums = ColumnSums.of(len(tokens), 2)
    for expert, rows in enumerate(tokens):
        for weight, x in rows:
            sums.add(torch.tensor([x]), torch.tensor([weight]), expert)
    return sums


def entry_importance(sums: ColumnSums) -> tuple[np.ndarray, np.ndarray]:
    in_sum2, counts = sums.entry()
    assert in_sum2.dtype == counts.dtype == np.float32
    return in_sum2 / counts[:, None], counts


def test_an_expert_is_shrunk_by_its_effective_tokens() -> None:
    even, uneven = [(1.0, [1.0, 0.0])] * 4, [(1.0, [0.0, 1.0]), (0.0, [0.0, 1.0]), (0.0, [0.0, 1.0])]
    importance, counts = entry_importance(sums_of([even, uneven]))
    layer = np.array([4, 1]) / 2.5
    for found, own, effective in ((importance[0], [2, 0], 4), (importance[1], [0, 2], 1)):
        trust = effective / (effective + PRIOR_TOKENS)
        np.testing.assert_allclose(found, trust * np.array(own) + (1 - trust) * layer, rtol=1e-6)
    np.testing.assert_array_equal(counts, [4, 3])


def test_an_unseen_expert_gets_the_layer_mean_with_count_one() -> None:
    importance, counts = entry_importance(sums_of([[(2.0, [3.0, 1.0])], []]))
    np.testing.assert_allclose(importance[1], [9 / 5, 1 / 5], rtol=1e-6)
    assert counts[1] == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_gradients_does_not_matter(scale: float) -> None:
    def tokens(s: float) -> list[list[tuple[float, list[float]]]]:
        return [[(s, [1.0, 2.0]), (3 * s, [2.0, 1.0])]]

    np.testing.assert_allclose(entry_importance(sums_of(tokens(scale)))[0], entry_importance(sums_of(tokens(1)))[0])


def test_without_any_gradient_columns_are_alike() -> None:
    importance, _ = entry_importance(sums_of([[(0.0, [1.0, 2.0])], []]))
    np.testing.assert_array_equal(importance, np.ones((2, 2)))
