"""The importance matrix: every modality has its say, and no expert is left without one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import ALL_ROWS, Role, SourceTensor
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.export.imatrix_file import read_imatrix, write_imatrix
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.importance.imatrix import DEFAULT_MODALITY_WEIGHTS, Importance, balanced_imatrix, importance_of

TENSOR = SourceTensor(
    name="blk.0.ffn_gate_exps.weight",
    shape=(3, 4, 2),
    role=Role.EXPERT,
    sources=("x",),
    read=lambda _, rows=ALL_ROWS: np.zeros((4, 2), np.float32)[rows],
    activation="blk.0.ffn_exps.input",
)


def statistics_of(sum2: Sequence[object], count: list[list[int]]) -> CalibrationStatistics:
    arrays = {
        "blk.0.ffn_exps.input.sum2": np.array(sum2, np.float64),
        "blk.0.ffn_exps.input.count": np.array(count, np.int64),
    }
    return CalibrationStatistics("m", "f", arrays, SampleCounts(1, 1, 1, 1), TEXT_ATTENTION, ("d",))


UNEVEN = statistics_of(
    # text: 10 tokens, key vision: 1000, redundant: 4000; means of squares per expert are 1, 2, 3, ...
    sum2=[[[4, 8], [6, 6], [0, 0]], [[900, 100], [100, 900], [0, 0]], [[4000, 4000], [0, 0], [0, 0]]],
    count=[[4, 6, 0], [500, 500, 0], [4000, 0, 0]],
)


def test_modalities_weigh_alike_whatever_their_numbers() -> None:
    in_sum2, counts = balanced_imatrix(UNEVEN, [TENSOR], (1, 1, 0))[TENSOR.name]
    # Expert 0: (4/10 * mean text + 500/1000 * mean key) / (4/10 + 500/1000), by hand.
    columns = importance_of({TENSOR.name: (in_sum2, counts)})[TENSOR.name][0]
    by_hand = (np.array([4, 8]) / 10 + np.array([900, 100]) / 1000) / (4 / 10 + 500 / 1000)
    np.testing.assert_allclose(columns, by_hand, rtol=1e-6)
    # 1010 tokens of both modalities, shared out as 0.4 + 0.5 to 0.6 + 0.5.
    np.testing.assert_allclose(counts, [454.5, 555.5, 1], atol=0.5)
    assert in_sum2.dtype == counts.dtype == np.float32


def test_expert_never_routed_gets_the_layer_mean_with_count_one() -> None:
    in_sum2, counts = balanced_imatrix(UNEVEN, [TENSOR])[TENSOR.name]
    assert counts[2] == 1
    np.testing.assert_allclose(in_sum2[2], (in_sum2[:2] / counts[:2, None]).mean(axis=0), rtol=1e-6)


def test_redundant_tokens_weigh_little_by_default() -> None:
    with_default, without, alike = (
        importance_of(balanced_imatrix(UNEVEN, [TENSOR], weights))[TENSOR.name][0]
        for weights in (DEFAULT_MODALITY_WEIGHTS, (1.0, 1.0, 0.0), (1.0, 1.0, 1.0))
    )
    assert np.abs(with_default - without).max() < np.abs(alike - without).max() / 3


def test_a_modality_without_tokens_has_no_say() -> None:
    text_only = statistics_of(
        [[[4, 8], [6, 6], [2, 2]]] + [[[0, 0]] * 3] * 2,
        [[4, 6, 2], [0, 0, 0], [0, 0, 0]],
    )
    in_sum2, counts = balanced_imatrix(text_only, [TENSOR])[TENSOR.name]
    np.testing.assert_allclose(counts, [4, 6, 2], rtol=1e-6)
    np.testing.assert_allclose(in_sum2, [[4, 8], [6, 6], [2, 2]], rtol=1e-6)
    with pytest.raises(InputError, match="no token of a modality with positive weight"):
        balanced_imatrix(text_only, [TENSOR], (0, 1, 1))


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, -1, 1)])
def test_senseless_weights(weights: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="modality weights"):
        balanced_imatrix(UNEVEN, [TENSOR], weights)


def test_statistics_of_another_model() -> None:
    with pytest.raises(InputError, match="lacks other"):
        balanced_imatrix(UNEVEN, [replace(TENSOR, activation="other")])


def test_all_tensors_with_an_input_are_in(checkpoint: Checkpoint, statistics: CalibrationStatistics) -> None:
    tensors = text_tensors(checkpoint)
    imatrix = balanced_imatrix(statistics, tensors)
    assert set(imatrix) == {tensor.name for tensor in tensors if tensor.activation is not None}
    for in_sum2, counts in imatrix.values():
        assert (counts >= 1).all()
        assert (counts == np.rint(counts)).all()
        assert np.isfinite(in_sum2).all()
        assert (in_sum2 >= 0).all()


def test_the_file_gives_back_the_same_importance(
    checkpoint: Checkpoint, statistics: CalibrationStatistics, importance: Importance, tmp_path: Path
) -> None:
    imatrix = balanced_imatrix(statistics, text_tensors(checkpoint))
    write_imatrix(tmp_path / "imatrix.gguf", imatrix, statistics.datasets, chunk_count=1, chunk_size=512)
    read = read_imatrix(tmp_path / "imatrix.gguf")
    assert set(read) == set(importance)
    for name, values in importance.items():
        np.testing.assert_array_equal(read[name], values)
