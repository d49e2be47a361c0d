"""Tensors of experts taken apart by type: every expert in exactly one place, and the map that says where."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode_gguf.architectures.tensors import ALL_ROWS, Role, SourceTensor
from mode_gguf.errors import InputError
from mode_gguf.quantization.expert_groups import (
    layer_groups,
    map_bytes,
    map_name,
    stored_tensors,
    stored_types,
)
from mode_gguf.quantization.types import INDEX, QUANT_TYPES, QuantType

NAMES = ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight")
Q2, Q3, Q4 = (QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K"))


def experts_tensor(name: str, n_experts: int) -> SourceTensor:
    weights = np.arange(n_experts * 512, dtype=np.float32).reshape(n_experts, 2, 256)

    def read(expert: int, rows: slice = ALL_ROWS) -> np.ndarray:
        return weights[expert, rows]

    return SourceTensor(name, weights.shape, Role.EXPERT, (name,), read, "a", 0, name.split("_")[1])


def model(n_experts: int) -> list[SourceTensor]:
    weights = np.zeros((n_experts, 256), np.float32)
    router = SourceTensor(
        "blk.0.ffn_gate_inp.weight", weights.shape, Role.KEEP, ("r",), lambda _, rows=ALL_ROWS: weights[rows]
    )
    return [router, *(experts_tensor(name, n_experts) for name in NAMES)]


@given(st.lists(st.tuples(st.sampled_from([Q2, Q3, Q4]), st.sampled_from([Q2, Q3, Q4])), min_size=1, max_size=20))
def test_every_expert_is_where_the_map_says(pairs: list[tuple[QuantType, QuantType]]) -> None:
    experts = dict(zip(NAMES, zip(*pairs, strict=True), strict=True))
    tensors = model(len(pairs))
    stored = stored_tensors(tensors, experts)
    types = stored_types(dict.fromkeys(NAMES, Q2), experts)
    by_name = {tensor.name: tensor for tensor in stored.tensors}
    assert types.keys() == by_name.keys() - {"blk.0.ffn_gate_inp.weight"}
    if len(set(pairs)) == 1:
        assert [tensor.name for tensor in stored.tensors] == [tensor.name for tensor in tensors]
        assert [types[name] for name in NAMES] == list(pairs[0])
        return
    places = by_name[map_name(0)].read(0)
    assert places.dtype == np.int32
    assert places.shape == by_name[map_name(0)].shape == (len(set(pairs)), len(pairs))
    assert types[map_name(0)] is INDEX
    for expert, own in enumerate(pairs):
        (group,) = np.flatnonzero(places[:, expert] >= 0)
        for whole, name, quant_type in zip(tensors[1:], NAMES, own, strict=True):
            part = by_name[name if group == 0 else name.replace("weight", f"{group}.weight")]
            assert types[part.name] is quant_type
            np.testing.assert_array_equal(part.read(int(places[group, expert])), whole.read(expert))
            assert stored.experts_of(part)[places[group, expert]] == expert


def test_rows_follow_their_experts() -> None:
    stored = stored_tensors(model(3), dict.fromkeys(NAMES, (Q2, Q3, Q2)))
    arrays = {NAMES[0]: np.array([[1.0], [2.0], [3.0]]), "output.weight": np.array([[4.0]])}
    for name, expected in ((NAMES[0], [1, 3]), ("blk.0.ffn_gate_exps.1.weight", [2]), ("output.weight", [4])):
        found = stored.rows_of(name, arrays)
        assert found is not None
        assert found.ravel().tolist() == expected
    assert stored.rows_of(NAMES[1], arrays) is None


def test_groups_are_by_all_projections_together() -> None:
    groups = layer_groups({NAMES[0]: (Q2, Q2, Q3), NAMES[1]: (Q2, Q4, Q4)})
    assert [group.experts for group in groups[0]] == [(0,), (1,), (2,)]
    assert dict(groups[0][1].types) == {NAMES[0]: Q2, NAMES[1]: Q4}


def test_maps_take_no_more_than_was_reserved() -> None:
    tensors = model(5)
    stored = stored_tensors(tensors, dict.fromkeys(NAMES, (Q2, Q3, Q4, Q2, Q2)))
    (places,) = (tensor for tensor in stored.tensors if tensor.role is Role.INDEX)
    assert places.read(0).nbytes <= map_bytes(tensors, 3)


@pytest.mark.parametrize(
    ("experts", "complaint"),
    [
        (
            {NAMES[0]: [Q2, Q3], NAMES[1]: [Q2, Q3]},
            "types of 2 experts for blk.0.ffn_gate_exps.weight, the model has 3",
        ),
        ({NAMES[0]: [Q2, Q3, Q2]}, "gives blk.0.ffn_down_exps.weight one type"),
        ({NAMES[0]: [Q2, Q3, Q2], NAMES[1]: [Q2]}, "numbers of experts in layer 0 differ"),
        ({"blk.7.ffn_up_exps.weight": [Q2, Q3, Q2]}, "blk.7.ffn_up_exps.weight, which the model does not have"),
        ({"output.weight": [Q2]}, "output.weight, which is in no layer"),
    ],
)
def test_plans_that_do_not_fit_are_refused(experts: dict[str, Sequence[QuantType]], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        stored_tensors(model(3), experts)
