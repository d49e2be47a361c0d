"""Files of a work folder beside its full-precision file: the steps that the comparisons share."""

from pathlib import Path

import pytest

from llama_cpp_kl import compared, exported, full_precision, mean_and_error, shown
from mode_gguf import pipeline
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.report import ValidationReport


def test_a_plan_is_exported_and_compared_with_the_full_precision_file(
    pico: Path, held_out_folder: Path, tmp_path: Path
) -> None:
    run = pipeline.open_model(pico, tmp_path)
    plan = pipeline.make_uniform_plan(run, QUANT_TYPES["Q4_K"], imatrix="plain", packing=EXACT)
    text = exported(run, plan)
    report = compared(run, text, held_out_folder, plan)
    kl, error = mean_and_error(report.text)
    assert 0 < error < kl
    assert mean_and_error(report.image)[0] > 0
    assert ValidationReport.load(text.with_suffix(".json")) == report
    assert (tmp_path / f"reference-{held_out_folder.name}-stock").is_dir()
    assert "export" not in run.cache.entries()

    itself = compared(run, full_precision(run), held_out_folder)
    assert mean_and_error(itself.text)[0] < 1e-6 * kl


def test_what_was_not_measured_is_no_number() -> None:
    with pytest.raises(SystemExit, match="needs texts and questions"):
        mean_and_error(None)


def test_a_mean_is_shown_with_its_error() -> None:
    assert shown((0.0123456, 0.0007)) == "0.01235 ± 0.00070"
