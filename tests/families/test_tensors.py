"""GGUF tensors of every family: their names, their roles, and their values against transformers' own parameters."""

import re
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from mode_gguf.architectures import find_family, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from tests.families.cases import every_case, every_layout
from tests.families.conftest import Families
from tests.families.family_case import Converted, FamilyCase
from tests.families.parameters import parameters_by_source

EXPERT_SOURCES = {"gate": "gate_up_proj", "up": "gate_up_proj", "gate_up": "gate_up_proj", "down": "down_proj"}


@every_case
def test_family(case: FamilyCase, families: Families) -> None:
    checkpoint = families.checkpoint(case.layouts[0])
    family = find_family(checkpoint)
    assert [family.hf_class] == checkpoint.config["architectures"]
    assert (family.gguf_arch, family.projector_type) == (case.gguf_arch, case.projector_type)


@every_layout
def test_names_and_roles(case: FamilyCase, layout: str, families: Families) -> None:
    tensors = text_tensors(families.checkpoint(layout))
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names)
    assert {tensor.name: tensor.role for tensor in tensors if tensor.layer is None} == case.outside
    for layer, expected in enumerate(case.layers):
        prefix = f"blk.{layer}."
        inside = {tensor.name.removeprefix(prefix): tensor.role for tensor in tensors if tensor.layer == layer}
        assert inside == expected, f"layer {layer}"
    layers = [tensor.layer for tensor in tensors if tensor.layer is not None]
    assert layers == sorted(layers), "layers stay together"
    vision = projector_tensors(families.checkpoint(layout))
    inside_blocks = {f"v.blk.{block}.{name}" for block in range(case.vision_blocks) for name in case.vision_block}
    assert sorted(tensor.name for tensor in vision) == sorted({*case.vision, *inside_blocks})
    assert {tensor.layer for tensor in vision} == {None}


@every_case
def test_activations(case: FamilyCase, families: Families) -> None:
    """Matrices that something reads have its statistics under their own name, experts of a layer share theirs."""
    for tensor in text_tensors(families.checkpoint(case.layouts[0])):
        match tensor.role:
            case Role.EXPERT:
                read = "hidden" if tensor.projection == "down" else "input"
                assert tensor.activation == f"blk.{tensor.layer}.ffn_exps.{read}"
            case Role.DENSE | Role.OUTPUT:
                assert tensor.activation == tensor.name
            case _:
                assert tensor.activation is None


@every_layout
def test_experts_are_those_transformers_computes_with(case: FamilyCase, layout: str, families: Families) -> None:
    state, width = families.state(case), case.pico.WIDTH
    experts = [tensor for tensor in text_tensors(families.checkpoint(layout)) if tensor.role is Role.EXPERT]
    assert sorted({int(tensor.layer or 0) for tensor in experts}) == case.moe_layers
    for tensor in experts:
        weights = state[expert_parameter(state, tensor)]
        weights = {"gate": weights[:, :width], "up": weights[:, width:]}.get(str(tensor.projection), weights)
        assert tensor.name == f"blk.{tensor.layer}.ffn_{tensor.projection}_exps.weight"
        assert tensor.shape == weights.shape
        assert tensor.n_experts == case.pico.EXPERTS
        for expert in range(tensor.n_experts):
            matrix = tensor.read(expert)
            assert matrix.dtype == np.uint16, "transposing must not widen"
            assert matrix.flags.c_contiguous
            np.testing.assert_array_equal(as_float32(matrix), weights[expert], err_msg=tensor.name)
            np.testing.assert_array_equal(tensor.read(expert, slice(3, 7)), matrix[3:7])
            across = slice(width - 2, width + 3)
            np.testing.assert_array_equal(tensor.read(expert, across), matrix[across])


@every_layout
def test_reading_an_expert_reads_nothing_else(
    case: FamilyCase, layout: str, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = text_tensors(families.checkpoint(layout))
    read, sizes_read = Checkpoint.read, []

    def recording(self: Checkpoint, name: str, index: Any = None) -> np.ndarray:
        array = read(self, name, index)
        sizes_read.append(array.size)
        return array

    monkeypatch.setattr(Checkpoint, "read", recording)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT and tensor.layer == case.moe_layers[0]]
    assert len(experts) >= 2
    for tensor in experts:
        tensor.read(1)
    assert sizes_read == [np.prod(tensor.shape[1:]) for tensor in experts]


@every_layout
def test_every_other_tensor_is_made_of_what_transformers_holds(
    case: FamilyCase, layout: str, families: Families
) -> None:
    """By way of the case's conversions, whole and in part; nothing that transformers has is left over."""
    checkpoint, state = families.checkpoint(layout), families.state(case)
    tensors = [*text_tensors(checkpoint), *projector_tensors(checkpoint)]
    stored, parameters = stored_tensors(checkpoint), parameters_by_source(checkpoint, state)
    named = named_parameters(case)
    left = {name for name in state if name != "lm_head.weight" or "output.weight" in case.outside}
    for tensor in tensors:
        if tensor.role is Role.EXPERT:
            left.discard(expert_parameter(state, tensor))
            continue
        convert = conversion_of(case, tensor.name)
        if convert is None:
            continue
        (source,) = tensor.sources
        parameter = named.get(tensor.name) or parameters.get(source)
        left.discard(str(parameter))
        expected = convert(state[parameter] if parameter else stored[source])
        assert tensor.shape == expected.shape, tensor.name
        np.testing.assert_array_equal(as_float32(tensor.read(0)), expected, err_msg=tensor.name)
        for rows in (slice(1, 3), slice(3, 7)):
            np.testing.assert_array_equal(as_float32(tensor.read(0, rows)), expected[rows], err_msg=tensor.name)
        if tensor.order is not None and tensor.role is Role.DENSE:
            ours = slice(None) if tensor.order.rows is None else tensor.order.rows
            columns = slice(None) if tensor.order.columns is None else tensor.order.columns
            np.testing.assert_array_equal(state[str(parameter)][ours][:, columns], expected, err_msg=tensor.name)
    for name in left:  # transformers has in parts what is stored in one
        read = find_family(checkpoint).layout.read_parameter(checkpoint, name)
        assert read is not None, name
        np.testing.assert_array_equal(as_float32(read), state[name], err_msg=name)


@every_layout
def test_parameters_that_are_named(case: FamilyCase, layout: str, families: Families) -> None:
    """By name in both worlds, and as the streamed model is given them."""
    checkpoint, state = families.checkpoint(layout), families.state(case)
    family = find_family(checkpoint)
    tensors = {tensor.name: tensor for tensor in (*text_tensors(checkpoint), *projector_tensors(checkpoint))}
    for name, parameter in named_parameters(case).items():
        assert tensors[name].sources == (family.layout.stored_name(parameter),)
        convert = conversion_of(case, name)
        assert convert is not None
        np.testing.assert_array_equal(as_float32(tensors[name].read(0)), convert(state[parameter]), err_msg=name)
        special = family.layout.read_parameter(checkpoint, parameter)
        read = checkpoint.read(tensors[name].sources[0]) if special is None else special
        np.testing.assert_array_equal(as_float32(read), state[parameter], err_msg=parameter)


@every_layout
def test_all_layouts_make_the_same_tensors(case: FamilyCase, layout: str, families: Families) -> None:
    ours, first = (families.checkpoint(name) for name in (layout, case.layouts[0]))
    for tensors in (text_tensors, projector_tensors):
        for found, expected in zip(tensors(ours), tensors(first), strict=True):
            assert (found.name, found.shape, found.role) == (expected.name, expected.shape, expected.role)
            for index in range(found.n_experts):
                np.testing.assert_array_equal(found.read(index), expected.read(index), err_msg=found.name)


def stored_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All that the checkpoint's files hold, in F32."""
    files = sorted(checkpoint.path.glob("*.safetensors"))
    return {name: value.float().numpy() for file in files for name, value in load_file(file).items()}


def named_parameters(case: FamilyCase) -> dict[str, str]:
    """The case's own pairs of GGUF names and parameters."""
    n_blocks = {"blk": len(case.layers), "v": case.vision_blocks}
    return {
        ours.format(n=n): theirs.format(n=n)
        for ours, theirs in case.parameters.items()
        for n in range(n_blocks[ours.partition(".")[0]] if "{n}" in ours else 1)
    }


def expert_parameter(state: dict[str, np.ndarray], tensor: SourceTensor) -> str:
    """The experts of a layer in transformers: (E, 2I, H) with gate's rows before up's, or (E, H, I)."""
    ending = f"experts.{EXPERT_SOURCES[str(tensor.projection)]}"
    (name,) = (name for name in state if f"language_model.layers.{tensor.layer}." in name and name.endswith(ending))
    return name


def conversion_of(case: FamilyCase, name: str) -> Converted | None:
    """What the case does to the checkpoint's tensor; nothing by default."""
    found = [convert for pattern, convert in case.converted.items() if re.fullmatch(pattern, name)]
    return found[0] if found else lambda array: array
