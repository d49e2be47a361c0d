"""A wrong export is found: what calibration saw in transformers against the full-precision file, before judging."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from mode_gguf.architectures.family import ModelFamily
from mode_gguf.probes import Probes
from tests.e2e.conftest import QUICK, Ended, Run, settings
from tests.families.gguf_copy import gguf_copy
from tests.report.pages import Page

FEW = (*QUICK, *settings("validation.text_tokens=16", "validation.answer_tokens=4"))
"""A validation that asks for little of what follows the check."""


@pytest.fixture
def work(pico: Path, out: Path, run: Run) -> Path:
    """A converted work folder, written once and read only."""
    if not out.exists():
        run("convert", pico, "--bpw", "4.0", "--out", out, *FEW)
    return out


def model_files(work: Path) -> tuple[Path, Path, Path]:
    """The quantized file, the full-precision one and the projector."""
    (quantized,), (full,), (mmproj,) = (work.glob(name) for name in ("*MODE.gguf", "pico*-BF16.gguf", "mmproj-*"))
    return quantized, full, mmproj


def test_the_report_says_how_far_the_export_is(work: Path) -> None:
    found = json.loads((work / "report.json").read_text())["transformers"]
    assert found["file"] == model_files(work)[1].name
    assert (found["dtype"], found["kl_bound"], found["chat_template"], found["warnings"]) == ("float32", 0.01, True, [])
    assert found["tokens"] > 1000
    assert 0 < found["text"]["kl_median"] < 0.002
    assert 0 < found["image"]["kl_median"] < 0.002
    page = Page((work / "report.html").read_text(encoding="utf-8"))
    assert "held against the checkpoint in transformers first" in page.text("quality")
    assert "behind a question about a picture; up to 0.01 counts as the same model" in page.text("quality")
    assert page.faults == []


@dataclass(frozen=True)
class Fault:
    """A fault of the text model, or of the projector, and the message that names its stage."""

    message: str
    keys: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    tensors: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    projector: bool = False


def instead(token: str, other: str) -> Callable[[list[str]], list[str]]:
    return lambda tokens: [other if one == token else one for one in tokens]


def rolled(data: np.ndarray) -> np.ndarray:
    return np.roll(data, 1, axis=0)


TEXT = "most likely in its text model (its tensors or its hyperparameters): of the prompt 'prose' its predictions are "
IMAGE = "most likely in its projector or image preprocessing (such as mean and standard deviation): of the prompt "
FAULTS = {
    "rope base": Fault(TEXT, {"qwen3vlmoe.rope.freq_base": lambda base: 4 * base}),
    "one tensor": Fault(TEXT, tensors={r"blk\.1\.ffn_down_exps\.weight": rolled}),
    "router": Fault(TEXT, tensors={r"blk\.0\.ffn_gate_inp\.weight": rolled}),
    "special token as padding": Fault(
        "most likely in its tokenizer: the special token '<|im_start|>' is ",
        {"tokenizer.ggml.tokens": instead("<|im_start|>", "[PAD400]")},
    ),
    "special token that is none": Fault(
        "most likely in its tokenizer: the special token '",
        {"tokenizer.ggml.token_type": lambda types: [1] * len(types)},
    ),
    "shifted ids": Fault(
        "most likely in its tokenizer: ",
        {"tokenizer.ggml.tokens": lambda tokens: [*tokens[1:9], tokens[0], *tokens[9:]]},
    ),
    "beginning": Fault(
        "most likely in its tokenizer: it begins a text with [", {"tokenizer.ggml.add_bos_token": lambda adds: True}
    ),
    "another template": Fault(
        "most likely in its chat template: it writes a question as ",
        {"tokenizer.chat_template": lambda source: source.replace("<|im_start|>", "<|im_end|>")},
    ),
    "no template": Fault(
        "most likely in its chat template: it writes a question as 'nothing: it cannot be used'",
        left_out=("tokenizer.chat_template",),
    ),
    "mean": Fault(IMAGE, {"clip.vision.image_mean": lambda mean: [0.1, 0.2, 0.3]}, projector=True),
    "standard deviation": Fault(IMAGE, {"clip.vision.image_std": lambda std: [1.0, 1.0, 1.0]}, projector=True),
    "projector": Fault(IMAGE, tensors={r"mm\.2\.weight": rolled}, projector=True),
}


def refused(work: Path, tmp_path: Path, fault: Fault, run: Run) -> str:
    """The one line of `validate`, on files with a fault in a work folder."""
    quantized, full, mmproj = model_files(work)
    source = mmproj if fault.projector else full
    wrong = gguf_copy(source, tmp_path / source.name, left_out=fault.left_out, rewritten=fault.tensors, keys=fault.keys)
    if fault.projector:
        full, mmproj = Path(shutil.copy(full, tmp_path)), wrong
    else:
        full = wrong
    shutil.copy(work / "probes.safetensors", tmp_path)
    report = tmp_path / "report.json"
    asked = ("validate", quantized, "--reference", full, "--mmproj", mmproj, "--report", report)
    line = run(*asked, code=5)
    assert not report.exists()
    assert (tmp_path / "report-failed.txt").read_text().strip() in line
    return line


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(fault: Fault, work: Path, tmp_path: Path, run: Run) -> None:
    line = refused(work, tmp_path, fault, run)
    assert fault.message in line
    assert "nothing was judged by it" in line
    assert "--no-validate" in line


def test_a_head_that_is_the_embedding(work: Path, tmp_path: Path, run: Run) -> None:
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(model_files(work)[1]).tensors}
    fault = Fault(TEXT, tensors={r"output\.weight": lambda data: np.array(tensors["token_embd.weight"])})
    assert fault.message in refused(work, tmp_path, fault, run)


def test_a_reference_of_another_name_is_only_compared_with(work: Path, tmp_path: Path, run: Run) -> None:
    """Nobody knows that it is of the same checkpoint."""
    quantized, full, mmproj = model_files(work)
    shutil.copy(work / "probes.safetensors", tmp_path)
    other = Path(shutil.copy(full, tmp_path / "other.gguf"))
    report = tmp_path / "report.json"
    run("validate", quantized, "--reference", other, "--mmproj", mmproj, "--report", report, "--text-tokens", "16")
    assert json.loads(report.read_text())["transformers"] is None
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "was not held against the checkpoint in transformers" in page.text("quality")


def test_convert_stops_at_a_wrong_export(
    pico: Path, work: Path, tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantized file and the one to compare with have the same fault, so that they agree."""
    right = ModelFamily.text_metadata

    def wrong(self: ModelFamily, *arguments: Any) -> Mapping[str, Any]:
        keys: Mapping[str, Any] = right(self, *arguments)
        return {key: 4.0 * value if key.endswith("rope.freq_base") else value for key, value in keys.items()}

    monkeypatch.setattr(ModelFamily, "text_metadata", wrong)
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    for file in (*copy.glob("*MODE.gguf"), *copy.glob("*-BF16.gguf"), copy / "report.json"):
        file.unlink()
    _, (line,) = ended("convert", pico, "--bpw", "4.0", "--out", copy, *FEW, code=5)
    assert TEXT in line
    assert not (copy / "report.json").exists()
    assert TEXT in (copy / "report-failed.txt").read_text()
    assert next(copy.glob("*MODE.gguf")).exists()


def test_a_machine_too_small_for_the_reference(
    pico: Path, work: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the quantized file is asked for its tokens and its template."""
    monkeypatch.setattr("mode_gguf.pipeline.stages.export.fits_half_of_memory", lambda size: False)
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    run("convert", pico, "--bpw", "4.0", "--out", copy, *FEW)
    found = json.loads((copy / "report.json").read_text())["transformers"]
    assert found["file"] == model_files(work)[0].name
    assert (found["text"], found["image"], found["kl_bound"], found["chat_template"]) == (None, None, None, True)
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert "Predictions were not compared, as there was no full-precision file" in page.text("quality")


def test_probes_that_are_gone_are_made_again_and_nothing_else(pico: Path, work: Path, tmp_path: Path, run: Run) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    before = Probes.load(copy / "probes.safetensors")
    (copy / "probes.safetensors").unlink()
    result = json.loads(run("convert", pico, "--bpw", "4.0", "--out", copy, "--json", *FEW))
    assert {stage for stage, seconds in result["seconds"].items() if seconds} == {"probes"}
    again = Probes.load(copy / "probes.safetensors")
    assert [probe.tokens for probe in again.probes] == [probe.tokens for probe in before.probes]


def test_an_importance_matrix_leaves_no_probes(pico: Path, work: Path, tmp_path: Path, run: Run) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    imatrix = Path(shutil.move(next(copy.glob("imatrix-pico*.gguf")), tmp_path / "given.gguf"))
    options = ("--calibration-from", imatrix, "--restart", *FEW[-4:])
    run("convert", pico, "--bpw", "4.5", "--out", copy, *options)
    assert not (copy / "probes.safetensors").exists()
    assert json.loads((copy / "report.json").read_text())["transformers"] is None
