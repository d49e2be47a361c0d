"""The whole way from a checkpoint to files that llama.cpp answers from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import LlamaFileType

from mode_gguf.allocation.plan import Plan
from mode_gguf.artifacts import file_fingerprint
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.options import GROUP_EXPERT_TYPES
from mode_gguf.quantization import libggml
from mode_gguf.quantization.packing import EXACT
from mode_gguf.validation.structure import check_structure
from mode_gguf.workfolder import WorkFolder
from tests.e2e.conftest import SMALL, Ended, Run, samples, settings
from tests.report.pages import Page

IQ = settings("sensitivity.types=IQ2_XXS,IQ2_S,IQ3_XXS,Q2_K,Q3_K", "sensitivity.dense_types=IQ2_XXS,Q3_K,Q4_K")


def test_convert_writes_everything_and_validates_it(pico: Path, out: Path, run: Run) -> None:
    result = json.loads(run("convert", pico, "--bpw", "4.0", "--out", out, "--json", *SMALL))
    assert set(result) == {"model", "mmproj", "mtp", "imatrix", "plan", "bpw", "size_bytes", "seconds"}
    assert 4.0 * 0.995 <= result["bpw"] <= 4.0
    model = Path(result["model"])
    assert model.name.startswith(f"{pico.name}-MODE-4.00bpw-Q")
    assert model.name.endswith("K_MODE.gguf")
    assert Path(result["mmproj"]).name == f"mmproj-{pico.name}-F16.gguf"
    assert Path(result["imatrix"]).name == f"imatrix-fisher-{pico.name}.gguf"
    assert model.stat().st_size == result["size_bytes"]
    stages = {"calibrate", "probes", "sensitivity", "plan", "round", "export", "projector", "reference", "validate"}
    assert set(result["seconds"]) == stages
    for name in (
        "plan.json",
        "tensor-types.txt",
        "calibration.safetensors",
        "sensitivity.safetensors",
        "report.json",
        "report.html",
    ):
        assert (out / name).exists(), name
    report = json.loads((out / "report.json").read_text())
    assert report["text"]["kl_mean"] > 0
    assert report["image"]["kl_mean"] > 0


def test_second_run_reuses_every_stage(pico: Path, out: Path, run: Run) -> None:
    result = json.loads(run("convert", pico, "--bpw", "4.0", "--out", out, "--json", *SMALL))
    assert set(result["seconds"].values()) == {0.0}


def test_the_page_says_how_the_file_was_made_and_how_it_behaves(
    pico: Path, out: Path, tmp_path: Path, run: Run
) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    before = {path.name: path.read_bytes() for path in copy.glob("*.json")}
    first = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert json.loads(run("report", copy, "--json")) == {"page": str(copy / "report.html")}
    assert before == {path.name: path.read_bytes() for path in copy.glob("*.json")}, "convert would validate again"
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert page.texts == first.texts
    assert page.faults == []
    assert "Not shown" not in (copy / "report.html").read_text()
    assert f"mode-gguf convert {pico} --bpw 4.0" in page.text("command")
    assert "calibrate, sensitivity, plan, round, export, projector, reference" in page.text("command")
    assert sum(str(found.get("src")).startswith("data:image/webp") for _, found in page.tags) > 3
    conversion = json.loads((copy / "report.json").read_text())["conversion"]
    made = set(json.loads(before["stages.json"])) - {"probes", "validate", "report"}
    assert {run["name"] for run in conversion["stages"]} == made
    assert len(conversion["prediction"]["this"]) == 2

    (model,) = copy.glob("*MODE*.gguf")
    found = json.loads(run("validate", model, "--report", tmp_path / "alone.json", "--json"))
    assert found["conversion"] == conversion
    assert "only what stands alone" in Page((tmp_path / "alone.html").read_text(encoding="utf-8")).text("quality")
    elsewhere = Path(shutil.copy(model, tmp_path / "elsewhere.gguf"))
    printed = run("validate", elsewhere, "--report", tmp_path / "elsewhere.json")
    assert str(tmp_path / "elsewhere.html") in printed
    page = Page((tmp_path / "elsewhere.html").read_text(encoding="utf-8"))
    assert page.faults == []
    assert "does not lie in the work folder" in page.text("types")
    assert "--report" in run("validate", model, "--report", tmp_path / "report.html", code=2)


def test_a_broken_limit_of_a_recipe_is_an_exit_code(pico: Path, tmp_path: Path, out: Path, ended: Ended) -> None:
    copy = shutil.copytree(out, tmp_path / "work")
    limited = settings("validation.limits.max_kl=1e-9")
    asked = ("convert", pico, "--bpw", "4.0", "--out", copy, "--json", *SMALL, *limited)
    said, errors = ended(*asked, code=5)
    assert Path(json.loads(said)["model"]).exists()
    assert "breaks --max-kl 1e-09: " in errors[0]


def test_another_budget_needs_no_new_measurement(pico: Path, out: Path, run: Run) -> None:
    result = json.loads(run("convert", pico, "--bpw", "3.7", "--out", out, "--json", "--no-validate", *SMALL))
    assert 3.7 * 0.995 <= result["bpw"] <= 3.7
    assert result["seconds"]["calibrate"] == result["seconds"]["sensitivity"] == 0.0
    assert result["seconds"]["plan"] > 0
    assert result["seconds"]["projector"] == 0.0


def test_other_settings_of_measurements_are_refused(pico: Path, out: Path, run: Run) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".log"}
    arguments = ("convert", pico, "--bpw", "4.0", "--out", out, "--no-validate")
    line = run(*arguments, *samples(4, 3), *settings("calibration.seed=1"), code=2)
    assert "`calibrate` was run here with other settings (text samples: 4 then, 3 now)" in line
    assert "--restart" in line
    line = run(*arguments, *SMALL, *settings("sensitivity.packing.effort=max", "sensitivity.types=Q2_K,Q4_K"), code=2)
    assert "`sensitivity`" in line
    assert "effort: default then, max now" in line
    assert "types: Q2_K Q3_K Q4_K Q5_K Q6_K then, Q2_K Q4_K now" in line
    lock = WorkFolder(out, pico.name).lock
    assert {path: path.read_bytes() for path in before if path != lock} == {
        path: content for path, content in before.items() if path != lock
    }


def test_an_edited_plan_is_followed(pico: Path, tmp_path: Path, out: Path, run: Run) -> None:
    copy = WorkFolder(Path(shutil.copytree(out, tmp_path / "copy")), pico.name)
    arguments = ("convert", pico, "--out", copy.path, "--json", "--no-validate", "--rounding", "nearest", *SMALL)
    run(*arguments, "--bpw", "3.7")
    plan = json.loads(copy.plan.read_text())
    (tensor,) = (tensor for tensor in plan["tensors"] if tensor["name"] == "blk.1.ffn_down_exps.weight")
    tensor["type"] = "Q6_K"
    copy.plan.write_text(json.dumps(plan))
    result = json.loads(run(*arguments, "--bpw", "3.7"))
    assert result["seconds"]["plan"] == 0.0
    assert result["seconds"]["export"] > 0
    facts = json.loads(run("inspect", result["model"], "--json"))
    assert {one["name"]: one["type"] for one in facts["tensors"]}[tensor["name"]] == "Q6_K"
    assert r"^blk\.1\.ffn_down_exps\.weight$=q6_K" in copy.tensor_types.read_text()

    run(*arguments, "--bpw", "3.8")
    assert json.loads((copy.path / "plan-edited.json").read_text()) == plan
    assert Plan.load(copy.plan).budget != Plan.load(copy.path / "plan-edited.json").budget


def test_what_is_removed_is_made_again(pico: Path, tmp_path: Path, out: Path, run: Run) -> None:
    copy = WorkFolder(Path(shutil.copytree(out, tmp_path / "copy")), pico.name)
    arguments = ("convert", pico, "--bpw", "3.7", "--out", copy.path, "--json", "--no-validate", *SMALL)
    removed = [copy.imatrix, copy.path / f"mmproj-{pico.name}-F16.gguf", copy.tensor_types]
    before = {path: path.read_bytes() for path in removed}
    for path in removed:
        path.unlink()
    seconds = json.loads(run(*arguments))["seconds"]
    assert {stage for stage, taken in seconds.items() if taken} == {"calibrate", "plan", "projector"}
    assert before == {path: path.read_bytes() for path in removed}
    copy.sensitivity.write_bytes(b"something else")
    assert "is not what `sensitivity` wrote" in run(*arguments, code=2)
    assert json.loads(run(*arguments, "--restart"))["seconds"]["sensitivity"] > 0


def test_stages_alone_give_the_same_file(pico: Path, out: Path, tmp_path: Path, run: Run) -> None:
    whole = json.loads(run("convert", pico, "--bpw", "4.0", "--out", out, "--json", "--no-validate", *SMALL))
    run("calibrate", pico, "--out", tmp_path, *SMALL)
    run("sensitivity", pico, "--out", tmp_path)
    planned = json.loads(run("plan", pico, "--bpw", "4.0", "--out", tmp_path, "--rounding", "feedback", "--json"))
    exported = json.loads(run("export", pico, "--out", tmp_path, "--json"))
    assert planned["bpw"] == whole["bpw"]
    assert Plan.load(tmp_path / "plan.json").types == Plan.load(out / "plan.json").types
    assert Path(exported["model"]).read_bytes() == Path(whole["model"]).read_bytes()
    assert Path(exported["mmproj"]).read_bytes() == Path(whole["mmproj"]).read_bytes()


def test_unit_kl_beside_what_sensitivity_predicted(pico: Path, out: Path, run: Run) -> None:
    small = settings("sensitivity.measured_samples=2", "sensitivity.types=Q2_K", "sensitivity.dense_types=Q4_K")
    result = json.loads(run("unit-kl", pico, "--out", out, "--json", *small))
    assert Path(result["unit_kl"]) == out / "unit-kl.safetensors"
    assert not (out / "unit-kl.partial").exists()
    assert {(row["part"], row["type"]) for row in result["compared"]} == {
        *((f"blk.{layer} experts", "Q2_K") for layer in range(3)),
        *((f"blk.{layer} attention", "Q4_K") for layer in range(3)),
        ("token_embd.weight", "Q4_K"),
        ("output.weight", "Q4_K"),
    }
    assert all(0 < value < 10 for row in result["compared"] for value in row["measured"])
    text = run("unit-kl", pico, "--out", out, *small)
    assert "text: predicted, measured" in text
    assert "blk.2 experts         Q2_K" in text


def test_a_size_is_the_file_s(pico: Path, out: Path, run: Run) -> None:
    result = json.loads(run("convert", pico, "--size", "2.4MiB", "--out", out, "--json", "--no-validate", *SMALL))
    assert 0.99 * 2.4 * 2**20 <= Path(result["model"]).stat().st_size <= 2.4 * 2**20
    assert "--size 0.10MiB cannot be reached" in run("plan", pico, "--size", "0.1MiB", "--out", out, code=3)


def test_a_budget_on_experts_alone_leaves_the_rest_large(pico: Path, out: Path, run: Run) -> None:
    result = json.loads(run("plan", pico, *settings("plan.budget.expert_bpw=3.2"), "--out", out, "--json"))
    assert 3.0 < result["experts_bpw"] <= 3.2
    plan = Plan.load(out / "plan.json")
    assert {plan.types["token_embd.weight"].name, plan.types["output.weight"].name} == {"Q8_0"}


def test_signals_change_single_parts_of_a_preset(pico: Path, out: Path, run: Run) -> None:
    signals = settings(
        "plan.costs.combination=frequency", "plan.costs.modality_weights=1,1,0", "plan.scope=layer", "plan.use_all=true"
    )
    run("plan", pico, "--bpw", "4.0", "--out", out, *signals)
    plan = Plan.load(out / "plan.json")
    assert plan.signals is not None
    assert plan.signals.costs.combination == "frequency"
    assert plan.signals.costs.modality_weights == (1.0, 1.0, 0.0)
    assert (plan.signals.scope, plan.signals.dense, plan.signals.equality) == ("layer", "fixed", True)
    assert "plan.costs.modality_weights" in run(
        "plan", pico, *settings("plan.costs.modality_weights=1,1"), "--out", out, code=2
    )
    assert "different budgets" in run("plan", pico, "--bpw", "4", "--size", "1MiB", "--out", out, code=2)
    assert "fixed" in run("plan", pico, *settings("plan.scope=layer", "plan.dense=measured"), "--out", out, code=2)


def test_a_plan_is_refined_by_what_is_measured(pico: Path, out: Path, run: Run) -> None:
    asked = settings("plan.refine=1", "sensitivity.measured_samples=2")
    text = run("plan", pico, "--bpw", "4.0", "--out", out, *asked)
    trials = Plan.load(out / "plan.json").refinement
    assert trials is not None
    assert trials[0].accepted
    assert text.count("tensors moved") == len(trials)
    best = min(trials, key=lambda trial: sum(trial.kl))
    assert best.accepted
    assert Plan.load(out / "plan.json").bpw <= 4.0


def test_a_type_per_expert_and_back(pico: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("convert", pico, "--out", tmp_path, "--json", "--no-validate", "--size", "2880KiB", *SMALL)
    result = json.loads(run(*arguments, "--granularity", "expert"))
    plan, model = Plan.load(tmp_path / "plan.json"), Path(result["model"])
    assert plan.has_expert_groups
    assert model.name.endswith("_MODE_GROUPS.gguf")
    assert SensitivityTable.load(tmp_path / "sensitivity.safetensors").expert_types[0] == "IQ2_XXS"
    assert 0.97 * 2880 * 1024 <= model.stat().st_size <= 2880 * 1024
    assert not (tmp_path / "tensor-types.txt").exists(), "stock llama-quantize cannot make this file"
    check_structure(model, plan.stored_types)
    facts = json.loads(run("inspect", model, "--json"))
    assert facts["experts_bpw"] == pytest.approx(plan.experts_bpw)
    assert facts["bpw"] == pytest.approx(plan.bpw)
    assert set(json.loads(run(*arguments, "--granularity", "expert"))["seconds"].values()) == {0.0}
    assert "plan.refine improves a type per tensor" in run(
        *arguments, "--granularity", "expert", *settings("plan.refine=1"), code=2
    )

    merged = json.loads(run(*arguments, "--granularity", "tensor"))
    assert merged["seconds"]["calibrate"] == merged["seconds"]["sensitivity"] == 0.0
    merged_plan = Plan.load(tmp_path / "plan.json")
    assert not merged_plan.has_expert_groups
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert saved["sensitivity"]["types"] == list(GROUP_EXPERT_TYPES), (
        "as measured before, so that any folder repeats it"
    )
    assert plan.solver is not None
    assert merged_plan.solver is not None
    assert 0 < plan.solver.objective < merged_plan.solver.objective
    assert Path(merged["model"]).stat().st_size <= 2880 * 1024
    assert model.exists()
    with LlamaModel(Path(merged["model"])) as loaded:
        assert np.isfinite(loaded.text_logits(loaded.tokenize("The sea is"))).all()


def test_convert_with_measured_units(pico: Path, tmp_path: Path, run: Run) -> None:
    asked = settings(
        *("plan.unit_kl=true", "sensitivity.measured_samples=2"),
        *("sensitivity.types=Q2_K,Q4_K", "sensitivity.dense_types=Q4_K"),
    )
    arguments = ("--bpw", "4.0", "--out", tmp_path, "--json", "--no-validate", *SMALL)
    result = json.loads(run("convert", pico, *arguments, *asked))
    assert "unit-kl" in result["seconds"]
    assert result["bpw"] <= 4.0


def test_paper_preset_makes_a_file_too(pico: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--preset", "paper", "--bpw", "4.0", "--out", tmp_path, "--json", "--no-validate", *SMALL)
    result = json.loads(run("convert", pico, *arguments))
    assert Plan.load(Path(result["plan"])).preset == "paper"
    assert result["bpw"] <= 4.0


def packed_with(model: str, run: Run) -> str:
    """The importance matrix that a file says it was packed with."""
    metadata = json.loads(run("inspect", model, "--json"))["metadata"]
    return str(metadata["quantize.imatrix.file"])


def test_another_imatrix_or_packing_reruns_what_depends_on_it(pico: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("convert", pico, "--bpw", "4.0", "--out", tmp_path, "--json", "--no-validate", *SMALL)
    default = json.loads(run(*arguments))
    assert packed_with(default["model"], run) == f"imatrix-fisher-{pico.name}.gguf"
    plan = Plan.load(Path(default["plan"]))
    assert (plan.made_from.imatrix_kind, plan.packing.mode) == ("fisher", "refined")
    assert plan.made_from.imatrix == file_fingerprint(Path(default["imatrix"]))
    refined = Path(default["model"]).read_bytes()

    def restarted(*options: str) -> dict[str, str]:
        """What `convert` gives when sensitivity is measured anew, and with it all that it feeds."""
        result: dict[str, Any] = json.loads(
            run(*arguments, *settings("sensitivity.packing.mode=exact", *options), "--restart")
        )
        assert result["seconds"].pop("projector") == 0.0
        assert result["seconds"].pop("calibrate") == 0.0
        assert min(result["seconds"].values()) > 0
        return result

    exact = restarted()
    assert Plan.load(Path(exact["plan"])).packing == EXACT
    assert Path(exact["model"]).read_bytes() != refined

    plain = restarted("sensitivity.imatrix=plain")
    assert packed_with(plain["model"], run) == f"imatrix-{pico.name}.gguf"
    assert Plan.load(Path(plain["plan"])).made_from.imatrix_kind == "plain"

    other = json.loads(run("export", pico, "--out", tmp_path, "--imatrix", "fisher", "--json"))
    assert packed_with(other["model"], run) == f"imatrix-fisher-{pico.name}.gguf"


def test_a_uniform_plan_is_no_conversion(pico: Path, tmp_path: Path, run: Run) -> None:
    said = run("convert", pico, "--out", tmp_path, *settings("plan.uniform=Q4_K"), code=2)
    assert "`mode-gguf plan --uniform Q4_K`" in said


def test_packing_belongs_to_sensitivity_unless_the_plan_is_uniform(
    pico: Path, out: Path, tmp_path: Path, run: Run
) -> None:
    message = run("plan", pico, *settings("sensitivity.packing.mode=exact"), "--out", out, code=2)
    assert "sensitivity.packing: exact, but candidates were packed refined when they were measured" in message
    run("plan", pico, "--uniform", "Q3_K", *settings("sensitivity.packing.mode=exact"), "--out", tmp_path)
    assert Plan.load(tmp_path / "plan.json").packing == EXACT


def test_unusable_size_power(pico: Path, tmp_path: Path, run: Run) -> None:
    assert "size_power: 0, 0.5, 1, ... 4 expected; found 0.3" in run(
        "convert", pico, *settings("sensitivity.packing.size_power=0.3"), "--out", tmp_path / "out", code=2
    )
    assert not (tmp_path / "out").exists()


def test_fisher_importance_needs_gradients(pico: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--preset", "paper", *settings("sensitivity.imatrix=fisher"), "--out", tmp_path / "out")
    assert "sensitivity.imatrix fisher needs gradients" in run("convert", pico, "--bpw", "4.0", *arguments, code=2)
    assert not (tmp_path / "out").exists()
    run("plan", pico, "--uniform", "Q2_K", "--out", tmp_path)
    assert "`mode-gguf sensitivity` writes it" in run("export", pico, "--imatrix", "fisher", "--out", tmp_path, code=4)


def test_dry_run_writes_nothing(pico: Path, tmp_path: Path, run: Run) -> None:
    facts = json.loads(run("convert", pico, "--bpw", "4.0", "--out", tmp_path / "dry", "--dry-run", "--json"))
    assert facts["reachable_bpw"][0] < 4.0 < facts["reachable_bpw"][1]
    assert not (tmp_path / "dry").exists()


def test_inspect_and_doctor(pico: Path, tmp_path: Path, run: Run) -> None:
    run("plan", pico, "--uniform", "Q4_K", "--out", tmp_path, "--json")
    exported = json.loads(run("export", pico, "--out", tmp_path, "--json"))
    facts = json.loads(run("inspect", exported["model"], "--json"))
    assert facts["bpw"] == pytest.approx(exported["bpw"])
    assert facts["metadata"]["general.architecture"] == "qwen3vlmoe"
    assert {tensor["type"] for tensor in facts["tensors"]} == {"F32", "Q4_K"}
    assert "Q4_K" in run("inspect", exported["model"])
    environment = json.loads(run("doctor", "--json"))
    assert environment["xllamacpp"] != "not installed"
    assert "llama.cpp" in environment
    assert environment["packed by libggml"].startswith("IQ2_XXS, ")
    assert "xllamacpp" in environment["libggml"]


def test_types_that_libggml_packs_reach_below_the_k_quants(pico: Path, tmp_path: Path, run: Run) -> None:
    assert "2.4" in run("convert", pico, "--bpw", "2.4", "--out", tmp_path, "--dry-run", code=3)
    result = json.loads(run("convert", pico, "--bpw", "2.4", "--out", tmp_path, "--json", *IQ, *SMALL))
    assert 2.4 * 0.995 <= result["bpw"] <= 2.4
    types = {name: quant_type.name for name, quant_type in Plan.load(tmp_path / "plan.json").types.items()}
    experts = {quant_type for name, quant_type in types.items() if "_exps" in name}
    assert "IQ2_XXS" in experts
    assert experts <= {"IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q2_K", "Q3_K"}
    assert types["token_embd.weight"] in {"Q3_K", "Q4_K"}, "the embedding has no importance, which IQ2_XXS needs"
    facts = json.loads(run("inspect", result["model"], "--json"))
    assert facts["metadata"]["general.file_type"] == LlamaFileType.MOSTLY_IQ2_XXS
    assert {tensor["name"]: tensor["type"] for tensor in facts["tensors"]}.items() >= types.items()
    assert json.loads((tmp_path / "report.json").read_text())["text"]["kl_mean"] > 0


def test_uniform_plan_of_a_type_that_needs_an_importance_matrix(pico: Path, tmp_path: Path, run: Run) -> None:
    run("plan", pico, "--uniform", "IQ2_XS", "--out", tmp_path)
    line = run("export", pico, "--out", tmp_path, code=4)
    assert "IQ2_XS, which needs an importance matrix" in line
    assert "mode-gguf calibrate" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--uniform", "IQ3_S"),
        settings("sensitivity.types=IQ3_S", "sensitivity.dense_types=Q4_K"),
        settings("sensitivity.types=Q4_K", "sensitivity.dense_types=IQ3_S"),
    ],
)
def test_types_of_libggml_without_it(
    pico: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(libggml, "embedded_library", lambda: None)
    libggml.library.cache_clear()
    line = run("plan", pico, "--out", tmp_path, *arguments, code=4)
    assert "pip install xllamacpp" in line
    assert "MODE_GGUF_LLAMA_CPP" in line
    libggml.library.cache_clear()
