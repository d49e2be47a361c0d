"""What calibration stores of every family in transformers, beside the files that are exported, in llama.cpp."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode_gguf.artifacts import read_arrays, write_arrays
from mode_gguf.errors import InputError, ValidationError
from mode_gguf.gguf.header import read_header
from mode_gguf.probes import Probes
from mode_gguf.validation.against_transformers import KL_BOUNDS, compare_with_transformers
from mode_gguf.validation.reference import RunSettings
from tests.families.cases import CASES, every_case
from tests.families.conftest import Families
from tests.families.family_case import FamilyCase
from tests.families.gguf_copy import gguf_copy

SETTINGS = RunSettings(context=512, threads=1)


@every_case
def test_exported_files_are_the_checkpoint(case: FamilyCase, families: Families) -> None:
    """With a wide margin: router's choices that hang on rounding included."""
    _, probes = families.calibration(case)
    text, mmproj = families.full_precision(case)
    found = compare_with_transformers(probes, text, mmproj, SETTINGS, predictions=True)
    assert [probe.name for probe in probes.probes] == ["prose", "code", "numbers and signs", "chat", "picture"]
    assert (found.dtype, found.kl_bound, found.warnings) == ("float32", KL_BOUNDS["float32"], ())
    assert found.chat_template
    assert found.tokens > 1000
    assert found.text is not None
    assert found.image is not None
    assert (found.text.positions, found.image.positions) == (128, 32)
    print(f"largest median KL: text {found.text.kl_median:.2g}, picture {found.image.kl_median:.2g} nats")
    assert found.text.kl_median < KL_BOUNDS["float32"] / 5
    assert found.image.kl_median < KL_BOUNDS["float32"] / 5


@every_case
def test_a_quantized_file_is_asked_for_tokens_and_template_alone(case: FamilyCase, families: Families) -> None:
    _, probes = families.calibration(case)
    text, mmproj = families.files(case)
    found = compare_with_transformers(probes, text, mmproj, SETTINGS, predictions=False)
    assert found.chat_template
    assert found.tokens > 1000
    assert (found.text, found.image, found.kl_bound) == (None, None, None)


def test_pictures_are_left_out_without_a_projector(families: Families) -> None:
    case = CASES[0]
    _, probes = families.calibration(case)
    found = compare_with_transformers(probes, families.files(case)[0], None, SETTINGS, predictions=True)
    assert found.image is None
    assert found.text is not None
    assert found.text.kl_median == pytest.approx(0, abs=1e-6)  # both in float32


def first_case_with(*, key: str, families: Families) -> tuple[FamilyCase, Path]:
    """A case whose text model has a key, and that file in full precision."""
    found = ((case, families.full_precision(case)[0]) for case in CASES)
    return next((case, path) for case, path in found if any(name.endswith(key) for name in read_header(path).metadata))


def test_a_missing_rope_scaling_is_found(families: Families, tmp_path: Path) -> None:
    case, path = first_case_with(key=".rope.scaling.type", families=families)
    _, probes = families.calibration(case)
    scaling = [name for name in read_header(path).metadata if ".rope.scaling." in name]
    wrong = gguf_copy(path, tmp_path / "wrong.gguf", left_out=scaling)
    with pytest.raises(ValidationError, match=r"most likely in its text model \(its tensors or its hyperparameters\)"):
        compare_with_transformers(probes, wrong, None, SETTINGS, predictions=True)


@pytest.fixture
def first(families: Families) -> tuple[Probes, Path, Path]:
    """Probes and files of the first case."""
    return families.calibration(CASES[0])[1], *families.full_precision(CASES[0])


def changed(probes: Probes, name: str, **changes: Any) -> Probes:
    """The probes, one of them changed."""
    return replace(probes, probes=[replace(one, **changes) if one.name == name else one for one in probes.probes])


def test_another_number_of_image_tokens_is_found(first: tuple[Probes, Path, Path]) -> None:
    probes, text, mmproj = first
    (picture,) = (one.picture for one in probes.probes if one.picture is not None)
    other = changed(probes, "picture", picture=np.ascontiguousarray(picture[:, :256]))
    message = "in its image preprocessing: a picture of 256 x 224 pixels takes 56 tokens, 98 in transformers"
    with pytest.raises(ValidationError, match=message):
        compare_with_transformers(other, text, mmproj, SETTINGS, predictions=True)


def test_what_a_base_has_brought_is_only_warned_of(first: tuple[Probes, Path, Path], tmp_path: Path) -> None:
    """Nobody here has written its vocabulary, template and projector; tensors are another matter."""
    probes, text, mmproj = first
    based = replace(probes, from_base=True)
    marked = {"tokenizer.chat_template": lambda source: source.replace("<|im_start|>", "<|im_end|>")}
    other = gguf_copy(text, tmp_path / "other.gguf", keys=marked)
    mean = {"clip.vision.image_mean": lambda mean: [0.1, 0.2, 0.3]}
    other_mmproj = gguf_copy(mmproj, tmp_path / "mmproj.gguf", keys=mean)
    found = compare_with_transformers(based, other, other_mmproj, SETTINGS, predictions=True)
    assert not found.chat_template
    assert [
        warning.partition(" differs from the checkpoint in transformers in its ")[2][:9] for warning in found.warnings
    ] == [
        "chat temp",
        "projector",
    ]
    wrong = gguf_copy(text, tmp_path / "wrong.gguf", keys={"qwen3vlmoe.rope.freq_base": lambda base: 4 * base})
    with pytest.raises(ValidationError, match="text model"):
        compare_with_transformers(based, wrong, mmproj, SETTINGS, predictions=True)


def test_save_and_load(first: tuple[Probes, Path, Path], tmp_path: Path) -> None:
    probes, path = first[0], tmp_path / "probes.safetensors"
    probes.save(path)
    loaded = Probes.load(path)
    assert replace(loaded, probes=()) == replace(probes, probes=())
    for one, other in zip(loaded.probes, probes.probes, strict=True):
        assert (one.name, one.text, one.tokens, one.place) == (other.name, other.text, other.tokens, other.place)
        np.testing.assert_array_equal(one.distributions.rows, other.distributions.rows)
        np.testing.assert_array_equal(one.picture, other.picture)


def without_tokens(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    del arrays["0.tokens"]


def flat_picture(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    arrays["4.picture"] = arrays["4.picture"].ravel()


def token_beyond(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    arrays["0.listed"][0, 0] = 1 << 20


def place_beyond(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    metadata["probes"][4]["place"] = [0, 1 << 20]


def huge_vocabulary(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    metadata["probes"][0]["vocabulary"] = 1 << 40


def no_chat(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    metadata["chat"] = {"templates": 1}


@pytest.mark.parametrize("change", [without_tokens, flat_picture, token_beyond, place_beyond, huge_vocabulary, no_chat])
def test_a_file_of_another_form_holds_no_probes(
    change: Callable[..., None], first: tuple[Probes, Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "probes.safetensors"
    first[0].save(path)
    arrays, metadata = read_arrays(path)
    change(arrays, metadata)
    write_arrays(path, arrays, metadata)
    with pytest.raises(InputError, match="holds no probes as calibration writes them"):
        Probes.load(path)
