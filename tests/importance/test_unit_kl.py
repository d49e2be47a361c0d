"""Unit KL: the table, the choice of samples, reruns, and what single experts get of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.modality import TEXT, TEXT_ATTENTION, KeyTokens
from mode_gguf.importance import unit_kl
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.quantized_kl import KlSettings, QuantizedKl, quantized_kl
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.importance.unit_kl import KlModel, measure_unit_kl, open_kl_model, stratified
from mode_gguf.importance.unit_kl_table import UnitKl, compare_kl, split_over_experts
from mode_gguf.importance.variants import Variant
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES

EXPERT_TYPES = (QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"])
DENSE_TYPES = (QUANT_TYPES["Q4_K"], QUANT_TYPES["IQ2_XS"])


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, samples: list[Sample]) -> KlModel:
    return open_kl_model(checkpoint, [samples[0], samples[4]], device="cpu")


@pytest.fixture(scope="module")
def settings(importance: Importance) -> KlSettings:
    return KlSettings(importance, EXACT, TEXT_ATTENTION)


def measure(model: KlModel, settings: KlSettings, partial: Path | None = None) -> UnitKl:
    dense = DENSE_TYPES[:1]
    return measure_unit_kl(
        model, settings, expert_types=EXPERT_TYPES, dense_types=dense, imatrix="plain", seed=4, partial=partial
    )


@pytest.fixture(scope="module")
def measured(model: KlModel, settings: KlSettings) -> UnitKl:
    return measure(model, settings)


def test_arrays_are_what_the_engine_measures(model: KlModel, settings: KlSettings, measured: UnitKl) -> None:
    assert len(measured.arrays) == 3 * 7 + 2
    for name, array in measured.arrays.items():
        assert array.shape == (2, 3, 2 if "_exps" in name else 1), name
        assert array.dtype == np.float64
        assert (array >= 0).all(), name
        assert (array[0, 1:] == 0).all(), "no vision tokens in texts"
        assert array[0, TEXT].min() > 0, name
    name = "blk.1.ffn_up_exps.weight"
    variants = [Variant("x", {name: (EXPERT_TYPES[0],) * 4}, modality) for modality in range(3)]
    expected = quantized_kl(model.streamed, model.inputs, variants, settings).variants
    np.testing.assert_allclose(measured.arrays[f"{name}.unit"][..., 0], expected.T, rtol=1e-5)
    assert (expected[:, 1] > 0).all()
    assert measured.positions == tuple(len(one.scored) for one in model.inputs)


def test_nothing_for_types_that_cannot_be(
    model: KlModel, settings: KlSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(tensor: Any, quant_type: Any) -> Any:
        return None if "attn_v" in tensor.name else quant_type

    monkeypatch.setattr(unit_kl, "stored_as", stored)
    arrays = measure(model, settings).arrays
    assert np.isnan(arrays["blk.0.attn_v.weight.unit"]).all()
    assert np.isfinite(arrays["blk.0.attn_k.weight.unit"]).all()


def test_a_rerun_continues(
    model: KlModel, settings: KlSettings, measured: UnitKl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "unit-kl.partial"
    passes: list[int] = []
    fail_at = [2]

    def counted(*arguments: Any, **options: Any) -> QuantizedKl:
        if len(passes) == fail_at[0]:
            raise KeyboardInterrupt
        passes.append(len(arguments[2]))
        return quantized_kl(*arguments, **options)

    monkeypatch.setattr(unit_kl, "quantized_kl", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(model, settings, partial)
    assert partial.exists()
    fail_at[0] = -1
    continued = measure(model, settings, partial)
    assert len(passes) == 4
    assert not partial.exists()
    assert continued.arrays.keys() == measured.arrays.keys()
    for name, array in measured.arrays.items():
        np.testing.assert_array_equal(array, continued.arrays[name])


def test_what_was_measured_otherwise_is_not_continued(
    model: KlModel, settings: KlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "unit-kl.partial"
    calls = []

    def pretended(*arguments: Any, **options: Any) -> QuantizedKl:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return QuantizedKl(np.zeros(2), np.zeros((len(arguments[2]), 2)), (1, 1))

    monkeypatch.setattr(unit_kl, "quantized_kl", pretended)
    with pytest.raises(KeyboardInterrupt):
        measure(model, settings, partial)
    measure(model, replace(settings, key_tokens=KeyTokens(ratio=0.5)), partial)
    assert len(calls) == 2 + 4


def test_save_and_load(measured: UnitKl, tmp_path: Path) -> None:
    measured.save(tmp_path / "u.safetensors")
    loaded = UnitKl.load(tmp_path / "u.safetensors")
    assert replace(loaded, arrays={}) == replace(measured, arrays={})
    for name, array in measured.arrays.items():
        np.testing.assert_array_equal(array, loaded.arrays[name])
    with pytest.raises(InputError, match="a sensitivity file was expected, found unit-kl"):
        SensitivityTable.load(tmp_path / "u.safetensors")


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "texts", "images"), [(4, 2, 2), (5, 3, 2), (7, 4, 3), (1, 1, 0), (99, 4, 4)])
def test_stratified(samples: list[Sample], budget: int, texts: int, images: int) -> None:
    drawn = stratified(samples, budget, seed=3)
    assert sum(not sample.has_image for sample in drawn) == texts
    assert sum(sample.has_image for sample in drawn) == images
    assert drawn == stratified(samples, budget, seed=3)
    assert [samples.index(sample) for sample in drawn] == sorted(samples.index(sample) for sample in drawn)


def test_stratified_fills_up_with_the_other_kind(samples: list[Sample]) -> None:
    few_images = samples[:5]
    assert sum(sample.has_image for sample in stratified(few_images, 4)) == 1
    assert len(stratified(few_images, 4)) == 4
    assert len({tuple(s.origin for s in stratified(samples, 4, seed=seed)) for seed in range(8)}) > 1


def test_no_samples(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    with pytest.raises(UsageError, match="sample budget is 0"):
        stratified(samples, 0)
    with pytest.raises(UsageError, match="at least one sample"):
        open_kl_model(checkpoint, [])


# --- shared out -------------------------------------------------------------------------------------------------------


def table_by(measured: UnitKl, answers: int = 2) -> SensitivityTable:
    """Random experts; nothing at all in one modality of one tensor."""
    generator = np.random.default_rng(0)
    arrays = {}
    for layer in range(3):
        for part in ("gate", "up", "down"):
            arrays[f"blk.{layer}.ffn_{part}_exps.weight.expert"] = generator.random((answers, 3, 4, 2))
        arrays[f"blk.{layer}.ffn_exps.expert"] = generator.random((answers, 3, 4, 2))
    arrays["blk.0.ffn_up_exps.weight.expert"][:, 1] = 0
    arrays |= {name: generator.random((answers, *array.shape[1:])) for name, array in measured.arrays.items()}
    return SensitivityTable(
        measured.model,
        measured.fingerprint,
        "fisher",
        measured.expert_types,
        measured.dense_types,
        arrays,
        (1, 1),
        3,
        0,
        {},
        measured.imatrix,
        measured.packing,
    )


@pytest.mark.parametrize("answers", [2, 1])
def test_split_over_experts(measured: UnitKl, answers: int) -> None:
    by = table_by(measured, answers)
    shared = split_over_experts(measured, by)
    assert shared.arrays.keys() == by.arrays.keys()
    for name, unit in measured.arrays.items():
        np.testing.assert_array_equal(shared.arrays[name], unit)
        if "_exps" in name:
            experts = shared.arrays[name.replace(".unit", ".expert")]
            assert experts.shape == (2, 3, 4, 2)
            np.testing.assert_allclose(experts.sum(axis=2), unit, rtol=1e-12)
    name = "blk.1.ffn_down_exps.weight"
    old, new = by.arrays[f"{name}.expert"][0, 0, :, 1], shared.arrays[f"{name}.expert"][0, 0, :, 1]
    np.testing.assert_allclose(new / new.sum(), old / old.sum())
    parts = [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    ratio = sum(measured.arrays[f"{part}.unit"][1, 0, 0] for part in parts) / sum(
        by.arrays[f"{part}.expert"][-1, 0, :, 0].sum() for part in parts
    )
    np.testing.assert_allclose(
        shared.arrays["blk.1.ffn_exps.expert"][1, 0, :, 0], ratio * by.arrays["blk.1.ffn_exps.expert"][-1, 0, :, 0]
    )
    empty = shared.arrays["blk.0.ffn_up_exps.weight.expert"][1, 1]
    np.testing.assert_allclose(empty, np.broadcast_to(empty[:1], empty.shape))


def test_a_table_of_another_kind_is_refused(measured: UnitKl) -> None:
    by = table_by(measured)
    for other in (replace(by, fingerprint="x"), replace(by, imatrix="fisher"), replace(by, dense_types=("Q8_0",))):
        with pytest.raises(InputError, match="measure both on the same checkpoint with the same options"):
            split_over_experts(measured, other)


def test_compared(measured: UnitKl) -> None:
    by = table_by(measured)
    rows = {(row.part, row.quant_type): row for row in compare_kl(measured, by)}
    assert len(rows) == 3 * (2 + 1) + 2
    experts = rows["blk.1 experts", "Q4_K"]
    names = [f"blk.1.ffn_{part}_exps.weight.unit" for part in ("gate", "up", "down")]
    for answer in range(2):
        assert experts.measured[answer] == pytest.approx(sum(measured.arrays[n][answer, :, 1].sum() for n in names))
        assert experts.predicted[answer] == pytest.approx(sum(by.arrays[n][answer, :, 1].sum() for n in names))
    assert rows["output.weight", "Q4_K"].measured[0] == pytest.approx(measured.arrays["output.weight.unit"][0].sum())
    fewer = replace(by, expert_types=("Q3_K", "Q4_K"))
    assert {row.quant_type for row in compare_kl(measured, fewer) if "experts" in row.part} == {"Q4_K"}
