"""Options that mean nothing are refused before anything is read or written, in one line that names them."""

from pathlib import Path

import pytest

from tests.e2e.conftest import Run


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("sensitivity", "--types", "", "names with commas between them expected"),
        ("plan", "--types", ",", "names with commas between them expected"),
        ("unit-kl", "--dense-types", "Q2_K,,Q3_K", "names with commas between them expected"),
        ("convert", "--set", "sensitivity.types=[]", "sensitivity.types: names with commas between them expected"),
        ("convert", "--bpw", "nan", "--bpw: "),
        ("convert", "--bpw", "inf", "--bpw: "),
        ("convert", "--bpw", "0", "--bpw: "),
        ("convert", "--bpw", "-1", "--bpw: "),
        ("convert", "--size", "8,5GB", "--size: a number with GB (10^9 bytes), GiB or G (2^30)"),
        ("convert", "--size", "-3GB", "--size: a number with GB"),
        ("convert", "--fit", "nan", "--fit: a number with GB"),
        ("convert", "--threads", "0", "--threads: "),
        ("convert", "--threads", "99999999", "--threads: "),
        ("convert", "--text-samples", "99999999999999999999", "--text-samples: "),
        ("convert", "--set", "calibration.seed=-1", "calibration.seed: "),
        ("convert", "--set", "calibration.seed=99999999999999999999", "calibration.seed: "),
        ("convert", "--set", "plan.budget.size=true", "plan.budget.size: a number with GB"),
    ],
)
def test_options_that_mean_nothing(
    command: str, option: str, value: str, message: str, pico: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "work"
    assert message in run(command, pico, option, value, "--out", out, code=2)
    assert not out.exists()


@pytest.mark.parametrize("types", ["q2_k,Q4_K", "Q2_K,Q2_K,Q4_K", " Q2_K , Q4_K "])
def test_types_as_people_write_them(types: str, pico: Path, tmp_path: Path, run: Run) -> None:
    asked = ("--set", f"sensitivity.types={types}", "--bpw", "3.6", "--out", tmp_path / "work", "--dry-run")
    assert "as Q2_K/Q4_K" in run("convert", pico, *asked)


def test_a_type_that_nobody_knows(pico: Path, tmp_path: Path, run: Run) -> None:
    asked = ("--set", "sensitivity.types=Q2_K,Q9_K", "--out", tmp_path / "work", "--dry-run")
    assert "unknown type 'Q9_K': choose from F32, F16" in run("convert", pico, *asked, code=2)
