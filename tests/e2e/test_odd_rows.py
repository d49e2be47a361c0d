"""Models of which some rows fit no K-quant: the range is said first, and llama.cpp answers from what is written."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import LlamaFileType
from PIL import Image

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.llama_cpp.ask import ask
from mode_gguf.pipeline.report_data import conversion_record, work_folder
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.structure import check_structure
from tests.e2e.conftest import SMALL, Run, settings
from tests.families.pico.qwen3_vl_moe import write_pico_qwen3vlmoe

FALLBACK_TYPES = {"IQ4_NL", "Q5_0", "Q5_1"}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Down projections have rows of 96 weights, everything else has rows of 256."""
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("narrow") / "Pico-VL-MoE", expert_width=96)


def test_what_is_out_of_reach_is_said_before_anything_runs(narrow: Path, tmp_path: Path, run: Run) -> None:
    line = run("convert", narrow, "--bpw", "2.9", "--out", tmp_path, *SMALL, "--json", code=3)
    assert "--bpw 2.9 cannot be reached" in line
    assert "takes 3.031 to 7.492 bits per weight" in line
    assert "rows of 96 in 3 tensors (" in line
    assert "do not fit Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and take IQ4_NL/Q5_0/Q5_1" in line
    assert not list(tmp_path.glob("*.safetensors"))
    facts = json.loads(run("convert", narrow, "--bpw", "4.5", "--out", tmp_path, "--dry-run", *SMALL, "--json"))
    assert "rows of 96" in json.dumps(facts)


def test_convert_chooses_fallback_types_and_llama_cpp_answers(
    narrow: Path, out: Path, tmp_path: Path, run: Run
) -> None:
    result = json.loads(run("convert", narrow, "--bpw", "4.5", "--out", out, "--no-validate", *SMALL, "--json"))
    assert 4.5 * 0.995 <= result["bpw"] <= 4.5
    plan, model = Plan.load(out / "plan.json"), Path(result["model"])
    down = {name: one.name for name, one in plan.types.items() if "ffn_down_exps" in name}
    assert set(down.values()) <= FALLBACK_TYPES
    assert all("_K" in one.name for name, one in plan.types.items() if "ffn_up_exps" in name)
    check_structure(model, plan.stored_types)
    table = SensitivityTable.load(out / "sensitivity.safetensors")
    assert table.fallback_types == dict.fromkeys(down, ("IQ4_NL", "IQ4_NL", "IQ4_NL", "Q5_0", "Q5_1"))
    for name in down:
        costs = table.arrays[f"{name}.unit"].sum(axis=(0, 1))
        assert costs[0] == costs[1] == costs[2] > costs[3] > 0
    assert "blk\\.0\\.ffn_down_exps\\.weight$=" + down["blk.0.ffn_down_exps.weight"].lower() in (
        (out / "tensor-types.txt").read_text().lower()
    )
    facts = conversion_record(work_folder(out))
    assert not facts.missing
    assert facts.plan is not None
    assert facts.prediction is not None
    assert facts.prediction.this is not None
    assert sum(facts.prediction.this) > 0
    assert {name for one in facts.plan.types if one.part == "ffn_down_exps" for name in one.types} <= FALLBACK_TYPES

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)).save(picture)
    assert isinstance(ask(model, Path(result["mmproj"]), picture, "What is it?", 2), str)


def test_an_expert_takes_types_that_go_together(narrow: Path, out: Path, run: Run) -> None:
    arguments = ("convert", narrow, "--bpw", "4.6", "--out", out, "--no-validate", *SMALL, "--json")
    types = (*settings("sensitivity.types=Q2_K,Q3_K,Q4_K,Q5_K,Q6_K"), "--granularity", "expert")
    result = json.loads(run(*arguments, *types))
    assert result["seconds"]["sensitivity"] == 0.0
    plan = Plan.load(out / "plan.json")
    assert plan.has_expert_groups
    stands_for = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "IQ4_NL", "Q5_K": "Q5_0", "Q6_K": "Q5_1"}
    for layer in range(3):
        up, down = (plan.experts[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("up", "down"))
        assert [stands_for[one.name] for one in up] == [one.name for one in down]
    check_structure(Path(result["model"]), plan.stored_types)
    prediction = conversion_record(work_folder(out)).prediction
    assert prediction is not None
    assert prediction.this is not None
    assert plan.solver is not None
    assert sum(prediction.this) == pytest.approx(plan.solver.objective, rel=0.05)
    assert json.loads(run("report", out, "--json"))["page"] == str(out / "report.html")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_every_32_block_type_is_one_that_llama_cpp_reads(narrow: Path, tmp_path: Path, run: Run, name: str) -> None:
    run("plan", narrow, "--uniform", name, "--out", tmp_path)
    result = json.loads(run("export", narrow, "--out", tmp_path, "--rounding", "nearest", "--json"))
    facts = json.loads(run("inspect", result["model"], "--json"))
    assert facts["metadata"]["general.file_type"] == getattr(LlamaFileType, f"MOSTLY_{name}")
    assert {t["type"] for t in facts["tensors"] if "_exps" in t["name"]} == {name}
    assert QUANT_TYPES[name].block_size == 32
    picture = tmp_path / "picture.png"
    Image.new("RGB", (96, 96), "red").save(picture)
    assert isinstance(ask(Path(result["model"]), Path(result["mmproj"]), picture, "What is it?", 2), str)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Down projections have rows of 500 weights, which no block divides."""
    return write_pico_qwen3vlmoe(tmp_path_factory.mktemp("odd") / "Pico-VL-MoE", expert_width=500)


def test_the_advice_for_rows_that_fit_no_block_leads_to_a_file(
    odd: Path, tmp_path_factory: pytest.TempPathFactory, run: Run
) -> None:
    out = tmp_path_factory.mktemp("odd") / "work"
    asked = ("convert", odd, "--bpw", "10", "--out", out, *SMALL, "--json")
    line = run(*asked, "--dry-run", code=3)
    assert line == run(*asked, code=3)
    assert "blk.0.ffn_down_exps.weight: rows of 500 weights" in line
    advice = line.rpartition(": ")[2].split()
    assert advice == ["--set", "sensitivity.types=Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,F16"]
    result = json.loads(run(*asked, *advice))
    plan = Plan.load(out / "plan.json")
    assert {t.name for n, t in plan.types.items() if "ffn_down_exps" in n} == {"F16"}
    assert {t.name for n, t in plan.types.items() if "ffn_up_exps" in n} != {"F16"}
    check_structure(Path(result["model"]), plan.stored_types)
    assert not conversion_record(work_folder(out)).missing
    again = (*asked, *advice, "--no-validate", "--granularity", "expert")
    assert json.loads(run(*again))["seconds"]["sensitivity"] == 0.0
    plan = Plan.load(out / "plan.json")
    assert {one.name for one in plan.experts["blk.0.ffn_down_exps.weight"]} == {"F16"}
    assert not conversion_record(work_folder(out)).missing
    run("frontier", odd, "--out", out, "--points", "3")


def test_odd_rows_in_files_of_one_type(odd: Path, tmp_path: Path, run: Run) -> None:
    """What fits no block is F16 there, as llama-quantize writes it."""
    run("plan", odd, "--uniform", "Q3_K", "--out", tmp_path)
    result = json.loads(run("export", odd, "--out", tmp_path, "--rounding", "nearest", "--json"))
    types = {t["name"]: t["type"] for t in json.loads(run("inspect", result["model"], "--json"))["tensors"]}
    assert (types["blk.0.ffn_down_exps.weight"], types["blk.0.ffn_up_exps.weight"]) == ("F16", "Q3_K")


@pytest.mark.parametrize(("width", "types"), [(2, "Q4_K,F16"), (20, "Q2_K,BF16")])
def test_rows_of_few_weights_convert(width: int, types: str, tmp_path: Path, run: Run) -> None:
    model = write_pico_qwen3vlmoe(tmp_path / "model", expert_width=width)
    quick = (*SMALL, *settings("sensitivity.packing.mode=exact", f"sensitivity.types={types}"), "--json")
    result = json.loads(run("convert", model, "--bpw", "6", "--out", tmp_path / "work", *quick, "--no-validate"))
    check_structure(Path(result["model"]), Plan.load(tmp_path / "work" / "plan.json").stored_types)


def test_rows_that_fit_no_k_quant_with_an_importance_matrix(narrow: Path, tmp_path: Path, run: Run) -> None:
    entries = {
        tensor.name: (np.ones((tensor.n_experts, tensor.row_width)), np.ones(tensor.n_experts))
        for tensor in text_tensors(Checkpoint.open(narrow))
        if tensor.activation is not None
    }
    write_imatrix(tmp_path / "imatrix.gguf", entries, ("d",), 1, 10)
    given = ("--calibration-from", tmp_path / "imatrix.gguf", "--bpw", "4.5", "--out", tmp_path / "work", "--json")
    result = json.loads(run("convert", narrow, *given, "--no-validate"))
    assert result["bpw"] <= 4.5
    plan = Plan.load(tmp_path / "work" / "plan.json")
    assert {t.name for n, t in plan.types.items() if "ffn_down_exps" in n} <= FALLBACK_TYPES
    assert not conversion_record(work_folder(tmp_path / "work")).missing
