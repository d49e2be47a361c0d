"""The sensitivity stage around the two ways of measuring: files, options, the paper's recipe, unseen experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.calibrate import run_watched
from mode_gguf.calibration.inputs import InputBuilder
from mode_gguf.calibration.key_tokens import TEXT_ATTENTION
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.calibration.watch import Pass
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.sensitivity import measure_sensitivity
from mode_gguf.importance.table import SensitivityTable
from mode_gguf.importance.unseen import fill_unseen, unseen_experts
from mode_gguf.importance.weight_changes import change_of_weights
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from tests.pico import write_pico_qwen3vlmoe

TYPES = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paper_table(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, statistics: CalibrationStatistics
) -> SensitivityTable:
    table, imatrix = measure_sensitivity(
        checkpoint,
        samples,
        importance,
        expert_types=TYPES,
        dense_types=TYPES[1:],
        statistics=statistics,
        method="expert-mse",
        device="cpu",
    )
    assert imatrix == {}
    return table


def test_expert_mse_by_hand(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, paper_table: SensitivityTable
) -> None:
    """Layer 0, expert 1, text tokens, down at Q2_K: the mean square of hidden @ (change of down)."""
    builder = InputBuilder.open(checkpoint)
    hidden: list[torch.Tensor] = []

    def leave(passed: Pass, layer: int) -> None:
        if layer == 0 and passed.experts is not None:
            kept = {expert: (token, values) for expert, token, values in passed.experts.hidden}
            if 1 in kept:
                token, values = kept[1]
                hidden.append(values[passed.modality[token] == 0])

    run_watched(
        open_streamed(checkpoint, "cpu"),
        [builder.build(sample) for sample in samples],
        key_tokens=TEXT_ATTENTION,
        leave=leave,
        finish=lambda layer: None,
        description="test",
    )
    tensor = next(t for t in text_tensors(checkpoint) if t.name == "blk.0.ffn_down_exps.weight")
    change = change_of_weights(tensor, 1, TYPES[0], importance, EXACT, CPU)
    expected = float((torch.cat(hidden) @ change.T).square().mean())
    np.testing.assert_allclose(paper_table.arrays["blk.0.ffn_down_exps.weight.expert"][0, 0, 1, 0], expected, rtol=1e-4)


def test_expert_mse_units_are_frequency_times_error(
    paper_table: SensitivityTable, statistics: CalibrationStatistics
) -> None:
    assert paper_table.arrays["blk.1.ffn_up_exps.weight.expert"].shape == (1, 3, 4, 2)
    assert paper_table.arrays["blk.1.attn_q.weight.unit"].shape == (1, 3, 1)
    for name in ("gate", "up", "down"):
        per_expert = paper_table.arrays[f"blk.1.ffn_{name}_exps.weight.expert"]
        expected = (statistics.frequency(1)[None, :, :, None] * per_expert).sum(axis=2)
        np.testing.assert_allclose(paper_table.arrays[f"blk.1.ffn_{name}_exps.weight.unit"], expected, rtol=1e-6)


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
        ({"method": "expert-mse", "imatrix": "fisher"}, "--imatrix fisher needs gradients"),
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
    arguments: dict[str, Any] = {"samples": samples, "statistics": statistics, **options}
    with pytest.raises(UsageError, match=message):
        measure_sensitivity(
            checkpoint, importance=importance, expert_types=TYPES, dense_types=TYPES, device="cpu", **arguments
        )


def test_statistics_of_another_checkpoint(
    checkpoint: Checkpoint, samples: list[Sample], importance: Importance, statistics: CalibrationStatistics
) -> None:
    with pytest.raises(InputError, match="belongs to another checkpoint"):
        measure_sensitivity(
            checkpoint,
            samples,
            importance,
            expert_types=TYPES,
            dense_types=TYPES,
            statistics=replace(statistics, fingerprint="other"),
        )


@pytest.mark.parametrize("method", ["fisher", "expert-mse"])
def test_types_that_do_not_fit_are_not_a_number(
    method: str, tmp_path: Path, samples: list[Sample], statistics: CalibrationStatistics
) -> None:
    """Experts 320 wide: down cannot be a K-quant; a tied embedding carries the head's cost."""
    checkpoint = Checkpoint.open(write_pico_qwen3vlmoe(tmp_path / "odd", expert_width=320, tied=True))
    types = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q8_0"])
    table, _ = measure_sensitivity(
        checkpoint,
        samples[-2:],
        {},
        expert_types=types,
        dense_types=types,
        statistics=replace(statistics, fingerprint=checkpoint.fingerprint),
        method=method,  # type: ignore[arg-type]
        label_draws=1,
        device="cpu",
    )
    for name in ("blk.0.ffn_down_exps.weight.unit", "blk.0.ffn_down_exps.weight.expert", "blk.0.ffn_exps.expert"):
        assert np.isnan(table.arrays[name][..., 0]).all()
        assert np.isfinite(table.arrays[name][..., 1]).all()
    assert np.isfinite(table.arrays["blk.0.ffn_gate_exps.weight.unit"]).all()
    assert "output.weight.unit" not in table.arrays
    assert (table.arrays["token_embd.weight.unit"][-1, 0] > 0).all()


def test_unseen_experts_get_one_token_of_the_mean() -> None:
    cost = np.array([[8.0, 4.0, 0.0]])[None, ..., None]  # (1, 1, 3, 1): experts with 4, 2 and no tokens
    counts = np.array([[[4, 2, 0]]])
    error = np.array([[1.0], [1.0], [4.0]])
    summed = fill_unseen(cost, counts, error, summed=True)
    np.testing.assert_allclose(summed[0, 0, :, 0], [8, 4, 12 / 6 * (4 / 2)])
    means = fill_unseen(cost, counts, error, summed=False)
    np.testing.assert_allclose(means[0, 0, :, 0], [8, 4, 12 / 2 * (4 / 2)])
    assert unseen_experts(7, np.array([[[4, 2, 0], [0, 0, 0], [1, 1, 1]]])) == {"blk.7/text/text": [2]}
