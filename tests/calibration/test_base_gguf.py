"""Models without a family, run from their checkpoints: weights, statistics and costs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from mode_gguf.architectures import checkpoint_with_base, text_tensors
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.observers import Observer
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.data.samples import load_samples
from mode_gguf.errors import InputError
from mode_gguf.forward.inputs import model_inputs
from mode_gguf.forward.recorded_forward import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.imatrix import balanced_imatrix, importance_of
from mode_gguf.options import CalibrationOptions
from mode_gguf.pipeline import Calibrate, Run
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.workfolder import WorkFolder
from tests.base_gguf import open_base, write_family_base, write_olmoe_base
from tests.families.pico.base import LAYERS, TOP_K, write_pico_olmoe
from tests.importance.conftest import measured_on_cpu

TEXT = "The square is red. The circle is blue, and the triangle on the left is green. How many shapes are there?"
TYPE = QUANT_TYPES["Q3_K"]


def sample(text: str) -> Sample:
    return Sample(origin="test", dataset="test", text=text)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_olmoe(tmp_path_factory.mktemp("olmoe") / "olmoe")


def based(olmoe: Path, **options: bool) -> Checkpoint:
    path = write_olmoe_base(olmoe, olmoe.parent / f"{'-'.join(options) or 'as-it-is'}.gguf", **options)
    return checkpoint_with_base(Checkpoint.open(olmoe), open_base(path))


def test_parameters_are_those_that_transformers_loads(olmoe: Path) -> None:
    streamed = open_streamed(based(olmoe), "cpu")
    whole = AutoModelForCausalLM.from_pretrained(olmoe, dtype=torch.float32)
    assert streamed.text_model == "model"
    for layer in range(LAYERS):
        with streamed.loaded_layer(layer) as module:
            for name, parameter in module.named_parameters():
                expected = whole.get_parameter(f"model.layers.{layer}.{name}")
                assert torch.equal(parameter, expected), name
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(streamed.model.get_parameter(name), whole.get_parameter(name))


def statistics_and_logits(checkpoint: Checkpoint) -> tuple[Mapping[str, np.ndarray], torch.Tensor]:
    """Statistics of a text, and the logits on the way."""
    streamed = open_streamed(checkpoint, "cpu")
    inputs = model_inputs(checkpoint, [sample(TEXT)])
    observer = Observer(streamed.tensors, streamed.device)
    read: list[torch.Tensor] = []
    head = streamed.model.get_submodule("lm_head")
    hook = head.register_forward_hook(lambda module, arguments, output: read.append(arguments[0][0]))
    run_recorded(
        streamed,
        inputs,
        LayerConsumer(leave=observer.observe, finish=lambda layer: observer.finish_layer()),
        description="test",
    )
    hook.remove()
    return observer.arrays, linear(read[0], streamed.model.get_parameter("lm_head.weight"))


def test_rows_in_another_order_change_no_statistics(olmoe: Path) -> None:
    plain, logits = statistics_and_logits(based(olmoe))
    whole = AutoModelForCausalLM.from_pretrained(olmoe, dtype=torch.float32)
    (inputs,) = model_inputs(based(olmoe), [sample(TEXT)])
    ids = inputs.input_ids
    with torch.no_grad():
        expected = whole(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(logits, expected[-len(logits) :], atol=1e-4, rtol=1e-4)
    assert plain["blk.1.ffn_exps.input.count"].sum() == TOP_K * len(ids)
    moved, same = statistics_and_logits(based(olmoe, permute=True))
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=1e-5)
    assert moved.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_allclose(moved[name], array, rtol=1e-5, err_msg=name)


def costs(checkpoint: Checkpoint) -> Mapping[str, np.ndarray]:
    """Sensitivities of all matrices on one text."""
    statistics = calibrate(checkpoint, [sample(TEXT)], device="cpu")
    importance = importance_of(balanced_imatrix(statistics, text_tensors(checkpoint)))
    measured = measured_on_cpu(checkpoint, [sample(TEXT)], importance, statistics, (TYPE,), label_draws=1)
    return measured.table.arrays


def test_costs_do_not_depend_on_the_order_of_rows(olmoe: Path) -> None:
    tables = [costs(checkpoint) for checkpoint in (based(olmoe), based(olmoe, permute=True))]
    for name in ("blk.0.attn_q.weight.unit", "blk.2.attn_k.weight.unit", "blk.1.ffn_up_exps.weight.unit"):
        np.testing.assert_allclose(tables[1][name], tables[0][name], rtol=1e-3, err_msg=name)
        assert tables[0][name].max() > 0


def test_matrices_that_equal_none_are_calibrated_without(olmoe: Path) -> None:
    checkpoint = based(olmoe, swap_columns=True)
    statistics = calibrate(checkpoint, [sample(TEXT)], device="cpu")
    assert not statistics.has_vision
    assert "blk.0.attn_q.weight.count" in statistics.arrays
    assert "blk.0.attn_output.weight.count" not in statistics.arrays


def test_a_family_behind_the_door_gives_what_its_tables_give(pico: Path, tmp_path: Path) -> None:
    own = Checkpoint.open(pico)
    door = checkpoint_with_base(own, open_base(*write_family_base(own, tmp_path)))
    samples = load_samples(max_image_samples=1, max_text_samples=1)
    through, direct = (calibrate(checkpoint, samples, device="cpu") for checkpoint in (door, own))
    assert through.samples == direct.samples
    assert through.samples.vision_tokens > 0
    for name, array in direct.arrays.items():
        np.testing.assert_array_equal(through.arrays[name], array, err_msg=name)


def test_gate_and_up_that_are_one_tensor_cost_what_the_family_says(pico_gemma4: Path, tmp_path: Path) -> None:
    own = Checkpoint.open(pico_gemma4)
    door = checkpoint_with_base(own, open_base(*write_family_base(own, tmp_path)))
    direct, through = costs(own), costs(door)
    assert direct["blk.1.ffn_gate_up_exps.weight.unit"].max() > 0
    for name, array in direct.items():
        np.testing.assert_allclose(through[name], array, rtol=1e-5, err_msg=name)


def test_a_form_that_was_never_seen_is_named(
    olmoe: Path, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'use_cache'\nand more")

    monkeypatch.setattr("mode_gguf.calibration.calibrate.calibrate_and_probe", broken)
    options = CalibrationOptions(image_samples=0, text_samples=1)
    with pytest.raises(InputError, match=r"unexpected keyword argument 'use_cache'\); give llama-imatrix's file"):
        Run(based(olmoe), WorkFolder(tmp_path, "m")).ensure(Calibrate(options))
    with pytest.raises(TypeError):
        Run(Checkpoint.open(pico), WorkFolder(tmp_path, "m")).ensure(Calibrate(options))


def test_text_only_models_take_no_image(olmoe: Path) -> None:
    image = load_samples(max_image_samples=1, max_text_samples=0)
    with pytest.raises(InputError, match="is a text-only model"):
        calibrate(based(olmoe), image, device="cpu")
