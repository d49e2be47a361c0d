"""The sensitivity stage around the two ways of measuring: files, options, the paper's recipe, unrouted experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import as_float32
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.hooks import ExpertsCall, SampleTrace
from mode_gguf.forward.inputs import model_inputs
from mode_gguf.forward.modality import TEXT_ATTENTION, KeyTokens
from mode_gguf.forward.recorded_forward import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.sensitivity_table import METHODS, SensitivityTable
from mode_gguf.importance.unrouted_experts import fill_unrouted, unrouted_experts
from mode_gguf.importance.weight_errors import change_of_weights
from mode_gguf.quantization.packer import pack_matrix, unpack_matrix
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from mode_gguf.vocabulary import Method
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe
from tests.importance.conftest import measured_on_cpu

TYPES = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paper_table(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, statistics: CalibrationStatistics
) -> SensitivityTable:
    asked: dict[str, Any] = {"dense_types": TYPES[1:], "method": "expert-mse"}
    result = measured_on_cpu(checkpoint, samples, importance, statistics, TYPES, **asked)
    assert result.imatrix == {}
    assert result.token_weights is None
    return result.table


def test_expert_mse_by_hand(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, paper_table: SensitivityTable
) -> None:
    """Layer 0, expert 1, text tokens, down at Q2_K: the mean square of hidden @ (change of down)."""
    hidden: list[torch.Tensor] = []

    def leave(trace: SampleTrace, layer: int) -> None:
        if layer == 0 and trace.experts is not None:
            kept = {expert: (token, values) for expert, token, values in trace.experts.hidden}
            if 1 in kept:
                token, values = kept[1]
                hidden.append(values[trace.modality[token] == 0])

    run_recorded(
        open_streamed(checkpoint, "cpu"),
        model_inputs(checkpoint, samples),
        LayerConsumer(key_tokens=TEXT_ATTENTION, leave=leave),
        description="test",
    )
    tensor = next(t for t in text_tensors(checkpoint) if t.name == "blk.0.ffn_down_exps.weight")
    change = change_of_weights(tensor, 1, TYPES[0], importance, EXACT, CPU)
    expected = float((torch.cat(hidden) @ change.T).square().mean())
    np.testing.assert_allclose(paper_table.arrays["blk.0.ffn_down_exps.weight.expert"][0, 0, 1, 0], expected, rtol=1e-4)


def test_expert_mse_units_are_the_sums_of_their_experts(paper_table: SensitivityTable) -> None:
    assert paper_table.arrays["blk.1.ffn_up_exps.weight.expert"].shape == (1, 3, 4, 2)
    assert paper_table.arrays["blk.1.attn_q.weight.unit"].shape == (1, 3, 1)
    for name in ("gate", "up", "down"):
        per_expert = paper_table.arrays[f"blk.1.ffn_{name}_exps.weight.expert"]
        unit = paper_table.arrays[f"blk.1.ffn_{name}_exps.weight.unit"]
        np.testing.assert_allclose(unit, per_expert.sum(axis=2), rtol=1e-6)


def test_units_are_matrices_times_types(paper_table: SensitivityTable) -> None:
    in_experts, in_attention, outside_layers = 3 * 3 * 4 * 2, 3 * 4 * 1, 2 * 1
    assert paper_table.n_units == in_experts + in_attention + outside_layers


class Block:
    """Layer 1's MoE block on all samples, computed with its weights changed as wished."""

    def __init__(self, checkpoint: Checkpoint, samples: list[Sample]) -> None:
        self.calls: list[ExpertsCall] = []
        modality: list[torch.Tensor] = []
        streamed = open_streamed(checkpoint, "cpu")

        def leave(trace: SampleTrace, layer: int) -> None:
            if layer == 1 and trace.experts is not None:
                self.calls.append(trace.experts)
                modality.append(trace.modality)

        run_recorded(
            streamed,
            model_inputs(checkpoint, samples),
            LayerConsumer(key_tokens=TEXT_ATTENTION, leave=leave),
            description="test",
        )
        self.modality = torch.cat(modality)
        self.tensors = {t.name: t for t in text_tensors(checkpoint)}

    def output(self, changes: dict[tuple[str, int], torch.Tensor]) -> torch.Tensor:
        """The block's output (N, H) with some (projection, expert) changed."""
        x = torch.cat([call.input for call in self.calls])
        index, weight = (torch.cat([getattr(c, name) for c in self.calls]) for name in ("index", "weight"))
        output = torch.zeros_like(x)
        for expert in range(4):
            gate, up, down = (
                torch.from_numpy(as_float32(self.tensors[f"blk.1.ffn_{name}_exps.weight"].read(expert)))
                + changes.get((name, expert), torch.tensor(0.0))
                for name in ("gate", "up", "down")
            )
            y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            output += y * (weight * (index == expert)).sum(-1, keepdim=True)
        return output

    def mean_squares(self, changes: dict[tuple[str, int], torch.Tensor]) -> np.ndarray:
        """Mean square of what the changes do to the output, per modality (M,)."""
        squares = (self.output(changes) - self.output({})).square().mean(-1)
        return np.array([float(squares[self.modality == m].mean()) for m in range(3)])


def test_block_mse_is_the_mean_square_of_the_blocks_change(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, statistics: CalibrationStatistics
) -> None:
    """Against the block computed anew with one expert, or one projection of all experts, stored in Q2_K."""
    result = measured_on_cpu(checkpoint, samples, importance, statistics, TYPES, method="block-mse")
    table = result.table
    assert result.imatrix == {}
    block = Block(checkpoint, samples)

    def change(name: str, expert: int) -> torch.Tensor:
        tensor = block.tensors[f"blk.1.ffn_{name}_exps.weight"]
        return change_of_weights(tensor, expert, TYPES[0], importance, EXACT, CPU)

    for name in ("gate", "up", "down"):
        changes = {(name, expert): change(name, expert) for expert in range(4)}
        prefix = f"blk.1.ffn_{name}_exps.weight"
        np.testing.assert_allclose(table.arrays[f"{prefix}.unit"][0, :, 0], block.mean_squares(changes), rtol=1e-3)
        for expert in range(4):
            alone = {(name, expert): changes[name, expert]}
            measured = table.arrays[f"{prefix}.expert"][0, :, expert, 0]
            np.testing.assert_allclose(measured, block.mean_squares(alone), rtol=1e-3)
    together = {(name, 2): change(name, 2) for name in ("gate", "up", "down")}
    measured = table.arrays["blk.1.ffn_exps.expert"][0, :, 2, 0]
    np.testing.assert_allclose(measured, block.mean_squares(together), rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_the_errors_of_weights(
    method: Method, checkpoint: Checkpoint, samples: list[Sample], statistics: CalibrationStatistics
) -> None:
    """Packed without importance, so that they are the same whatever the method."""
    table = measured_on_cpu(checkpoint, samples[-1:], {}, statistics, TYPES, method=method, label_draws=1).table
    tensors = {t.name: t for t in text_tensors(checkpoint)}

    def relative(name: str, expert: int, quant_type: QuantType) -> float:
        matrix = as_float32(tensors[name].read(expert))
        change = change_of_weights(tensors[name], expert, quant_type, {}, EXACT, CPU).numpy()
        return float(np.square(change, dtype=np.float64).sum() / np.square(matrix, dtype=np.float64).sum())

    for name in ("token_embd.weight", "output.weight", "blk.1.attn_k.weight", "blk.1.ffn_down_exps.weight"):
        n_matrices = tensors[name].n_experts if "exps" in name else 1
        expected = [[relative(name, matrix, t) for t in TYPES] for matrix in range(n_matrices)]
        error = table.arrays[f"{name}.weight_error"]
        assert error.dtype == np.float64
        np.testing.assert_allclose(error, expected, rtol=1e-5)
    parts = (table.arrays[f"blk.1.ffn_{name}_exps.weight.weight_error"] for name in ("gate", "up", "down"))
    np.testing.assert_allclose(table.arrays["blk.1.ffn_exps.weight_error"], sum(parts), rtol=1e-5)


def test_key_tokens_are_those_of_the_statistics(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, statistics: CalibrationStatistics
) -> None:
    """If every vision token is key, none is redundant, and key ones carry what both carried before."""
    tables = [
        measured_on_cpu(
            checkpoint,
            samples[-2:],
            importance,
            replace(statistics, key_tokens=key_tokens),
            TYPES[:1],
            label_draws=1,
        )
        .table.arrays["blk.1.ffn_exps.expert"][1]
        .sum(axis=1)[:, 0]
        for key_tokens in (TEXT_ATTENTION, KeyTokens("all"))
    ]
    text, key, redundant = tables[0]
    assert redundant > 0
    np.testing.assert_allclose(tables[1], [text, key + redundant, 0], rtol=1e-5)


def test_save_and_load(paper_table: SensitivityTable, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.safetensors"
    paper_table.save(path)
    loaded = SensitivityTable.load(path)
    assert (loaded.method, loaded.expert_types, loaded.dense_types) == ("expert-mse", ("Q2_K", "Q4_K"), ("Q4_K",))
    assert (loaded.positions, loaded.draws, loaded.fingerprint) == (
        paper_table.positions,
        0,
        paper_table.fingerprint,
    )
    assert set(loaded.arrays) == set(paper_table.arrays)
    for name, array in paper_table.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)


def test_a_calibration_file_is_not_a_table(statistics: CalibrationStatistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="a sensitivity file was expected, found calibration"):
        SensitivityTable.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "unknown sensitivity method 'guess'"),
        ({"label_draws": 0}, "label draws is 0"),
        ({"imatrix": "guess"}, "unknown importance matrix 'guess'"),
        ({"method": "expert-mse", "imatrix": "fisher"}, "sensitivity.imatrix fisher needs gradients"),
        ({"samples": []}, "at least one sample"),
    ],
)
def test_bad_options(
    checkpoint: Checkpoint,
    samples: list[Sample],
    importance: Importance,
    statistics: CalibrationStatistics,
    options: dict[str, Any],
    message: str,
) -> None:
    asked = {"samples": samples, **options}
    chosen = asked.pop("samples")
    with pytest.raises(UsageError, match=message):
        measured_on_cpu(checkpoint, chosen, importance, statistics, TYPES, **asked)


def test_statistics_of_another_checkpoint(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, statistics: CalibrationStatistics
) -> None:
    with pytest.raises(InputError, match="belongs to another checkpoint"):
        measured_on_cpu(checkpoint, samples, importance, replace(statistics, fingerprint="other"), TYPES)


@pytest.mark.parametrize("method", METHODS)
def test_fallback_types_are_measured_where_rows_do_not_fit(
    method: Method, tmp_path: Path, samples: list[Sample], statistics: CalibrationStatistics
) -> None:
    """Experts 320 wide: down cannot be a K-quant; a tied embedding carries the head's cost."""
    checkpoint = Checkpoint.open(write_pico_qwen3vlmoe(tmp_path / "odd", expert_width=320, tied=True))
    types = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q8_0"])
    moved = replace(statistics, fingerprint=checkpoint.fingerprint)
    table = measured_on_cpu(checkpoint, samples[-2:], {}, moved, types, method=method, label_draws=1).table
    assert table.fallback_types == {f"blk.{layer}.ffn_down_exps.weight": ("IQ4_NL", "Q8_0") for layer in range(3)}
    down = next(one for one in text_tensors(checkpoint) if one.name == "blk.0.ffn_down_exps.weight")
    weights = as_float32(down.read(1))
    packed = pack_matrix(weights, QUANT_TYPES["IQ4_NL"], None, name=down.name)
    change = unpack_matrix(packed, QUANT_TYPES["IQ4_NL"], 320) - weights
    expected = np.square(change, dtype=np.float64).sum() / np.square(weights, dtype=np.float64).sum()
    assert table.arrays[f"{down.name}.weight_error"][1, 0] == pytest.approx(expected, rel=1e-5)
    together = table.arrays["blk.0.ffn_exps.weight_error"]
    of_parts = sum(table.arrays[f"blk.0.ffn_{part}_exps.weight.weight_error"] for part in ("gate", "up", "down"))
    np.testing.assert_allclose(together, of_parts, rtol=1e-6)
    for name in ("ffn_down_exps.weight.unit", "ffn_down_exps.weight.expert", "ffn_exps.expert"):
        assert (table.arrays[f"blk.0.{name}"][-1, 0, ..., 0] > table.arrays[f"blk.0.{name}"][-1, 0, ..., 1]).all()
    assert "output.weight.unit" not in table.arrays
    assert (table.arrays["token_embd.weight.unit"][-1, 0] > 0).all()


def test_unrouted_experts_get_one_token_of_the_mean() -> None:
    cost = np.array([[8.0, 4.0, 0.0]])[None, ..., None]  # (1, 1, 3, 1): experts with 4, 2 and no tokens
    counts = np.array([[[4, 2, 0]]])
    error = np.array([[1.0], [1.0], [4.0]])
    summed = fill_unrouted(cost, counts, error, summed=True)
    np.testing.assert_allclose(summed[0, 0, :, 0], [8, 4, 12 / 6 * (4 / 2)])
    means = fill_unrouted(cost, counts, error, summed=False)
    np.testing.assert_allclose(means[0, 0, :, 0], [8, 4, 12 / 2 * (4 / 2)])
    assert unrouted_experts(7, np.array([[[4, 2, 0], [0, 0, 0], [1, 1, 1]]])) == {"blk.7/text/text": [2]}
