"""Estimates of a conversion's resources, and refusals for want of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from mode_gguf import pipeline
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.samples import load_samples
from mode_gguf.errors import MissingResourceError
from mode_gguf.estimate.free_resources import FreeResources, disk_use, free_resources, memory_warning, shortages
from mode_gguf.estimate.machine import Machine, available_memory, measure_machine, total_memory
from mode_gguf.estimate.stage_estimates import (
    ModelSizes,
    StageEstimate,
    TokenCounts,
    Workload,
    stage_estimates,
)
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.options import CalibrationOptions
from mode_gguf.recipe import Recipe, settings_layer
from mode_gguf.workfolder import WorkFolder

GB = 10**9
STAGES = (
    StageEstimate("calibrate", memory=6 * GB, written=1 * GB),
    StageEstimate("sensitivity", memory=9 * GB, temporary=40 * GB),
    StageEstimate("round", memory=7 * GB, working=12 * GB),
    StageEstimate("export", memory=GB, written=12 * GB),
    StageEstimate("validate", memory=2 * GB, written=60 * GB),
)


@pytest.fixture(scope="module")
def sizes(pico_module: Path) -> ModelSizes:
    return ModelSizes.of(Checkpoint.open(pico_module))


def test_sizes(pico_module: Path, sizes: ModelSizes) -> None:
    checkpoint = Checkpoint.open(pico_module)
    tensors = text_tensors(checkpoint)
    assert sizes.weights == sum(tensor.n_weights for tensor in tensors)
    stored = sum(1 for _ in checkpoint.tensors)
    assert stored
    assert sizes.outside + sum(t.n_weights for t in tensors if t.layer is not None) == sizes.weights + sizes.vision
    assert 0 < sizes.active < sizes.weights
    assert sizes.used == 2


@pytest.mark.parametrize("folder", ["pico_module", "pico_internvl"])
def test_work_is_about_what_the_model_sees(folder: str, request: pytest.FixtureRequest) -> None:
    """Workloads of images in patches and in tiles."""
    checkpoint = Checkpoint.open(request.getfixturevalue(folder))
    sizes = ModelSizes.of(checkpoint)
    samples = load_samples(None, max_image_samples=6, max_text_samples=6)
    counts = TokenCounts.of(samples, sizes)
    builder = InputBuilder.open(checkpoint)
    seen = [builder.build(sample) for sample in samples]
    vision = sum(int(one.is_vision.sum()) for one in seen)
    assert counts.vision_tokens == pytest.approx(vision, rel=0.1)
    limit = TokenCounts.at_most(CalibrationOptions(image_samples=6, text_samples=6), sizes)
    assert limit.vision_tokens >= vision
    assert limit.tokens >= counts.tokens
    assert limit.longest >= max(len(one.input_ids) for one in seen)


WORKLOAD = Workload(
    counts=TokenCounts(10_000, 10_000, 512),
    model_bytes=GB,
    hidden_bytes=4 << 30,
    expert_types=5,
    dense_types=6,
    without_model=False,
    feedback=True,
    validate=True,
)


def test_estimates_grow_with_samples_and_not_with_memory(sizes: ModelSizes) -> None:
    few, many = (
        stage_estimates(sizes, replace(WORKLOAD, counts=TokenCounts(n, n, 512)), 2) for n in (1_000, 10_000_000)
    )
    assert [stage.stage for stage in few] == ["calibrate", "sensitivity", "round", "export", "projector", "validate"]
    assert all(stage.seconds is None for stage in few)
    assert all(small.memory <= large.memory for small, large in zip(few, many, strict=True))
    assert few[0].temporary == few[1].temporary == 0
    assert 0 < many[0].temporary < many[1].temporary
    small = replace(WORKLOAD, counts=TokenCounts(10_000_000, 10_000_000, 512), hidden_bytes=1 << 20)
    tight = stage_estimates(sizes, small, 2)
    assert tight[1].memory < many[1].memory
    assert tight[1].temporary > many[1].temporary


def test_nearest_rounding_and_no_validation_are_left_out(sizes: ModelSizes) -> None:
    names = [stage.stage for stage in stage_estimates(sizes, replace(WORKLOAD, feedback=False, validate=False), 2)]
    assert names == ["calibrate", "sensitivity", "export", "projector"]


def test_a_gpu_holds_the_weights(sizes: ModelSizes) -> None:
    machine = Machine(memory=GB, device_memory=24 * GB, flops=1e14, read_rate=1e9)
    on_gpu = stage_estimates(sizes, WORKLOAD, 2, machine)
    assert on_gpu[0].device_memory > 0
    assert all(stage.seconds is not None and stage.seconds >= 0 for stage in on_gpu)
    slower = stage_estimates(sizes, WORKLOAD, 2, replace(machine, flops=1e11))
    assert sum(stage.seconds or 0 for stage in slower) > sum(stage.seconds or 0 for stage in on_gpu)


def test_disks() -> None:
    assert disk_use(STAGES) == (73 * GB, 40 * GB)
    assert disk_use(STAGES[:-1]) == (25 * GB, 40 * GB)
    free = FreeResources(Path("/w"), 100 * GB, Path("/t"), 50 * GB, 16 * GB)
    assert shortages(STAGES, free) == []
    assert memory_warning(STAGES, free) is None
    (one,) = shortages(STAGES, replace(free, temporary=30 * GB))
    assert one.startswith("/t: about 40.0 GB are needed for hidden states, 30.0 GB are free")
    (one,) = shortages(STAGES, replace(free, temporary=None))
    assert one.startswith("/w: about 113.0 GB are needed, 100.0 GB are free")
    assert "`sensitivity` may take 8.4 GiB" in str(memory_warning(STAGES, replace(free, memory=8 * GB)))


def test_what_a_folder_has_counts_as_free(tmp_path: Path) -> None:
    before = free_resources(WorkFolder(tmp_path / "not" / "there", "m"))
    assert before.folder == tmp_path
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "m.gguf").write_bytes(bytes(50_000_000))
    after = free_resources(WorkFolder(tmp_path / "w", "m"))
    assert abs(after.disk - before.disk) < 25_000_000


def test_a_machine(pico_module: Path) -> None:
    machine = measure_machine("cpu", [pico_module / "config.json"])
    assert machine.device_memory is None
    assert machine.flops > 1e8
    assert machine.read_rate > 1e5
    assert 0 < available_memory() <= total_memory()


def test_convert_stops_before_a_full_disk(pico_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pipeline.open_model(pico_module, tmp_path / "out")
    full = FreeResources(tmp_path, 1000, tmp_path, None, GB)
    monkeypatch.setattr("mode_gguf.pipeline.estimating.free_resources", lambda folder: full)
    with pytest.raises(MissingResourceError, match=r"are needed, 1 kB are free; choose another disk with --out"):
        pipeline.convert(run, Recipe.of(settings_layer(["plan.budget.bpw=4.0"])))
    assert not run.folder.path.exists()
