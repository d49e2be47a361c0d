"""One type per expert: our patched llama.cpp against the stock build of the same sources.

Needs both builds: MODE_GGUF_STOCK_BUILD and MODE_GGUF_PATCHED_BUILD name folders with their libraries and programs.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.quantization.types import QUANT_TYPES
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe
from tests.families.pico.tokenizer import VOCAB
from tests.llama_cpp.builds import PATCHED, STOCK, named_build
from tests.llama_cpp.runtime import logits_of_build
from tests.llama_cpp.runtime.grouped_files import Groups, random_groups, write_dequantized, write_grouped
from tests.llama_cpp.runtime.logits_of_build import Request

pytestmark = pytest.mark.runtime

ROOT = Path(__file__).parents[3]
LAYERS, EXPERTS, USED = 3, 8, 3
PREFILL, TOKENS = 40, 48
TYPES = ("Q2_K", "Q3_K", "Q4_K")
PATHS = ("skip", "mask")


@dataclass(frozen=True, slots=True)
class Build:
    """A build of llama.cpp, asked in processes of their own."""

    folder: Path
    scratch: Path

    def ask(
        self,
        model: Path,
        *,
        repack: bool = False,
        path: str | None = None,
        tiled: bool = True,
        mmproj: Path | None = None,
        image: Path | None = None,
    ) -> np.ndarray | str:
        """Logits of a prompt and of tokens that follow one by one, or of an answer about an image, (TOKENS, VOCAB).

        Of a file that llama.cpp does not load, its reasons.

        Args:
            repack: weights may be rearranged at load.
            path: how groups are computed; by default the build chooses.
            tiled: products of 8 and more rows may take the kernel whose sums differ in their last bits.
        """
        out = self.scratch / "logits.npy"
        out.unlink(missing_ok=True)
        request = Request(
            build=str(self.folder),
            model=str(model),
            out=str(out),
            tokens=np.random.default_rng(7).integers(0, 400, TOKENS).tolist(),
            prefill=PREFILL,
            repack=repack,
            mmproj=str(mmproj) if mmproj else None,
            image=str(image) if image else None,
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GGML_CPU_TILED_MM": str(int(tiled))}
        environment.pop("LLAMA_EXPERT_GROUPS", None)
        if path is not None:
            environment["LLAMA_EXPERT_GROUPS"] = path
        command = [sys.executable, logits_of_build.__file__, request.to_json()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 1 and "Traceback" not in done.stderr:
            return done.stderr
        assert done.returncode == 0, done.stderr[-3000:]
        rows: np.ndarray = np.load(out)
        assert rows.shape == (TOKENS, VOCAB)
        assert np.isfinite(rows).all()
        return rows

    def logits(self, model: Path, **options: Any) -> np.ndarray:
        """Logits of a file that must load, asked with the options of `ask`."""
        answer = self.ask(model, **options)
        assert isinstance(answer, np.ndarray), answer
        return answer

    def refusal(self, model: Path, path: str | None = None) -> str:
        """llama.cpp's reasons not to load a file."""
        answer = self.ask(model, path=path)
        assert isinstance(answer, str)
        return answer


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expert-groups")


@pytest.fixture(scope="module")
def stock(scratch: Path) -> Build:
    return Build(named_build(STOCK), scratch)


@pytest.fixture(scope="module")
def patched(scratch: Path) -> Build:
    return Build(named_build(PATCHED), scratch)


@pytest.fixture(scope="module")
def checkpoint(scratch: Path) -> Checkpoint:
    folder = scratch / "checkpoint"
    return Checkpoint.open(write_pico_qwen3vlmoe(folder, layers=LAYERS, experts=EXPERTS, experts_used=USED))


@pytest.fixture(scope="module")
def uniform(scratch: Path, checkpoint: Checkpoint) -> dict[str, Path]:
    """Per type, the file with all experts in it and all else in Q6_K."""
    files = {name: scratch / f"{name}.gguf" for name in TYPES}
    for name, path in files.items():
        types = {
            tensor.name: QUANT_TYPES[
                name if tensor.role is Role.EXPERT else "Q6_K" if tensor.role is Role.DENSE else "F32"
            ]
            for tensor in text_tensors(checkpoint)
        }
        write_text_model(path, checkpoint, TensorPacking(types))
    return files


@pytest.fixture(scope="module")
def three_groups() -> Groups:
    return random_groups(range(LAYERS), EXPERTS, 3, seed=3)


@pytest.fixture
def refusal(uniform: dict[str, Path], three_groups: Groups, scratch: Path, patched: Build) -> Callable[..., str]:
    """refusal(path=None, **options): why the patched build does not load what `write_grouped` writes with `options`."""

    def refusal(path: str | None = None, **options: Any) -> str:
        file = write_grouped(scratch / "split.gguf", [uniform["Q3_K"]] * 3, three_groups, **options)
        return patched.refusal(file, path)

    return refusal


def assert_identical(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes(), f"largest difference {np.abs(found - expected).max()}"


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_ordinary_files_are_as_stock(
    name: str, repack: bool, uniform: dict[str, Path], stock: Build, patched: Build
) -> None:
    assert_identical(patched.logits(uniform[name], repack=repack), stock.logits(uniform[name], repack=repack))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", TYPES)
def test_groups_of_one_type_are_as_one_tensor(
    name: str, groups: int, path: str, uniform: dict[str, Path], scratch: Path, stock: Build, patched: Build
) -> None:
    """Prompt and single tokens. Tiles are off, because the mask gives some experts more rows, hence another kernel."""
    split = random_groups(range(LAYERS), EXPERTS, groups, seed=groups)
    file = write_grouped(scratch / "split.gguf", [uniform[name]] * groups, split)
    expected = stock.logits(uniform[name], tiled=False)
    assert_identical(patched.logits(file, path=path, tiled=False), expected)


@pytest.mark.parametrize("repack", [False, True])
def test_skipping_is_the_choice_on_a_cpu_and_keeps_every_kernel(
    repack: bool, uniform: dict[str, Path], three_groups: Groups, scratch: Path, stock: Build, patched: Build
) -> None:
    file = write_grouped(scratch / "split.gguf", [uniform["Q4_K"]] * 3, three_groups)
    expected = stock.logits(uniform["Q4_K"], repack=repack)
    assert_identical(patched.logits(file, repack=repack), expected)
    assert_identical(patched.logits(file, repack=repack, path="skip"), expected)


def test_layers_and_projections_may_stay_in_one_tensor(
    uniform: dict[str, Path], scratch: Path, stock: Build, patched: Build
) -> None:
    groups = random_groups([1], EXPERTS, 2, seed=5)
    file = write_grouped(scratch / "split.gguf", [uniform["Q3_K"]] * 2, groups, ungrouped=["down"])
    expected = stock.logits(uniform["Q3_K"], tiled=False)
    for path in PATHS:
        assert_identical(patched.logits(file, path=path, tiled=False), expected)


def test_a_group_may_be_a_single_expert(uniform: dict[str, Path], scratch: Path, stock: Build, patched: Build) -> None:
    groups = {layer: np.eye(EXPERTS, dtype=int)[layer] for layer in range(LAYERS)}
    file = write_grouped(scratch / "split.gguf", [uniform["Q4_K"]] * 2, groups)
    assert_identical(patched.logits(file), stock.logits(uniform["Q4_K"]))
    expected = stock.logits(uniform["Q4_K"], tiled=False)
    assert_identical(patched.logits(file, path="mask", tiled=False), expected)


@pytest.mark.parametrize("path", PATHS)
def test_types_by_expert_compute_the_weights_that_are_stored(
    path: str,
    uniform: dict[str, Path],
    three_groups: Groups,
    scratch: Path,
    stock: Build,
    patched: Build,
) -> None:
    """Against the same weights in F32: as close as files of one type are to theirs, and far from other weights."""

    def distance(found: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(((found - expected) ** 2).mean()))

    rounding = []
    for name in TYPES:
        weights = write_dequantized(scratch / "weights.gguf", [uniform[name]], {})
        rounding.append(distance(stock.logits(uniform[name]), stock.logits(weights)))

    files = [uniform[name] for name in TYPES]
    mixed = patched.logits(write_grouped(scratch / "mixed.gguf", files, three_groups), path=path)
    weights = write_dequantized(scratch / "weights.gguf", files, three_groups)
    assert distance(mixed, stock.logits(weights)) < 1.5 * max(rounding)

    other = {layer: np.roll(groups, 1) for layer, groups in three_groups.items()}
    weights = write_dequantized(scratch / "weights.gguf", files, other)
    assert distance(mixed, stock.logits(weights)) > 5 * max(rounding)


def test_stock_refuses_and_names_the_architecture(
    uniform: dict[str, Path], three_groups: Groups, scratch: Path, stock: Build
) -> None:
    file = write_grouped(scratch / "split.gguf", [uniform["Q3_K"]] * 3, three_groups)
    assert "unknown model architecture: 'qwen3vlmoe+expert_groups'" in stock.refusal(file)


@pytest.mark.parametrize("version", [None, 0, 2])
def test_other_versions_are_refused(version: int | None, refusal: Callable[..., str]) -> None:
    expected = f"expert_groups.version is {version or 0}, this build reads version 1"
    assert expected in refusal(version=version)


def test_groups_under_the_plain_architecture_are_refused(refusal: Callable[..., str]) -> None:
    assert "has wrong shape" in refusal(architecture_suffix="")


@pytest.mark.parametrize("suffix", ["+expert_groups2", "+other"])
def test_other_suffixes_are_unknown(suffix: str, refusal: Callable[..., str]) -> None:
    assert f"unknown model architecture: 'qwen3vlmoe{suffix}'" in refusal(architecture_suffix=suffix)


def _set(numbers: np.ndarray, group: int, expert: int, value: int) -> np.ndarray:
    changed = numbers.copy()
    changed[group, expert] = value
    return changed


def _swap_two_numbers(numbers: np.ndarray) -> np.ndarray:
    first, second = np.flatnonzero(numbers[0] >= 0)[:2]
    return _set(_set(numbers, 0, first, 1), 0, second, 0)


def _in_no_group(numbers: np.ndarray) -> np.ndarray:
    return _set(numbers, 0, int(numbers[0].argmax()), -1)


def _in_two_groups(numbers: np.ndarray) -> np.ndarray:
    """An expert moved to where another group has it already: numbers in order, counts right, one expert left out."""
    changed = numbers.copy()
    taken = np.flatnonzero(numbers[1] >= 0)[0]
    members = np.flatnonzero(numbers[0] >= 0)
    changed[0] = -1
    changed[0, np.sort([taken, *members[1:]])] = np.arange(len(members))
    return changed


@pytest.mark.parametrize(
    "change",
    [
        _swap_two_numbers,
        _in_no_group,
        _in_two_groups,
        partial(_set, group=2, expert=0, value=7),
        partial(_set, group=2, expert=0, value=-2),
    ],
    ids=["order", "none", "two", "beyond", "negative"],
)
def test_wrong_maps_are_refused(change: Callable[[np.ndarray], np.ndarray], refusal: Callable[..., str]) -> None:
    said = refusal(change_map=change)
    assert re.search(r"blk\.0\.ffn_exps_map\.weight does not number the experts of the groups of blk\.0\.ffn_", said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda numbers: numbers[:2], r"its groups have \d experts, expected 8"),
        (lambda numbers: np.vstack([numbers, numbers[:1]]), r"tensor 'blk\.0\.ffn_\w+\.3\.weight' not found"),
        (lambda numbers: numbers[:, :-1], r"tensor 'blk\.0\.ffn_exps_map\.weight' has wrong shape"),
        (lambda numbers: numbers.astype(np.float32), r"blk\.0\.ffn_exps_map\.weight: type is f32, expected i32"),
    ],
    ids=["group without a row", "row without a group", "expert missing", "type"],
)
def test_maps_of_another_shape_are_refused(
    change: Callable[[np.ndarray], np.ndarray], message: str, refusal: Callable[..., str]
) -> None:
    assert re.search(message, refusal(change_map=change))


def test_an_unknown_path_is_refused(refusal: Callable[..., str]) -> None:
    assert "LLAMA_EXPERT_GROUPS is 'fast', expected 'mask' or 'skip'" in refusal("fast")


@pytest.mark.parametrize("path", PATHS)
def test_answers_about_a_picture_are_as_of_stock(
    path: str,
    checkpoint: Checkpoint,
    uniform: dict[str, Path],
    three_groups: Groups,
    scratch: Path,
    stock: Build,
    patched: Build,
) -> None:
    mmproj = scratch / "mmproj.gguf"
    write_projector(mmproj, checkpoint, "F16")
    image, other = scratch / "picture.png", scratch / "other.png"
    pixels = np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(255 - pixels).save(other)
    file = write_grouped(scratch / "split.gguf", [uniform["Q3_K"]] * 3, three_groups)
    ask = partial(patched.logits, file, path=path, tiled=False, mmproj=mmproj)
    assert_identical(ask(image=image), stock.logits(uniform["Q3_K"], tiled=False, mmproj=mmproj, image=image))
    assert not np.array_equal(ask(image=image), ask(image=other))
